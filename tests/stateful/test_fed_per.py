"""FedPer: the head is trained and stays, the rest is averaged, and neither models nor updates hold a head."""

import numpy as np
import pytest
from plain_steps import SGD, Plain, near

from fedtune.bundles.bundle import open_bundle
from fedtune.workflows.plan import make_plan

HEAD = ("personal.method=head",)


def test_rounds_are_those_of_a_plain_loop(tiny_job, run_rounds, tmp_path):
    ran = run_rounds(tiny_job(*SGD, *HEAD, "federation.rounds=4"), tmp_path / "run")
    plain = Plain(ran.setup.job)
    body, heads = (
        {n: a for n, a in plain.first.items() if n.startswith("head.") == is_head}
        for is_head in (False, True)
    )
    own = {}
    for round in range(1, 5):
        names = plain.cohort(round)
        trained = {name: plain.walk(body | own.get(name, heads), name, round)[0] for name in names}
        own |= {name: {n: values[n] for n in heads} for name, values in trained.items()}
        body = plain.mean(
            [{n: trained[name][n] for n in body} for name in names], [plain.size(name) for name in names]
        )
    near(ran.run.newest().state.arrays, body)
    assert set(ran.kept.clients(ran.setup.split.clients, 4)) == set(own)
    for name, head in own.items():
        near(ran.kept.load(name, 4), head)
    parts, line = plain.setup.split, ran.run.metrics()[-1]
    held = {name: parts.held_out[parts.clients.place(name)] for name in own}
    examples = sum(map(len, held.values()))
    assert (
        line["personal_accuracy"]
        == pytest.approx(sum(plain.right(body | own[name], rows) for name, rows in held.items()) / examples)
        and line["personal_evaluated"] == examples
    )
    everybody = parts.held_out.rows  # with the initial head, as one who was never asked
    assert line["accuracy"] == pytest.approx(plain.right(body | heads, everybody) / len(everybody))


def test_fewer_bytes_go_as_planned(tiny_job, run_rounds, tmp_path):
    whole, kept = make_plan(tiny_job()), make_plan(tiny_job(*HEAD))
    run = run_rounds(tiny_job(*HEAD), tmp_path / "run").run
    line, bundle = run.metrics()[-1], open_bundle(run.bundle)
    assert not any(t.unit == "head" for t in bundle.schema.tensors) and "head" not in {
        u.name for u in kept.units
    }
    assert (
        whole.update_bytes - kept.update_bytes == pytest.approx(4 * kept.head, abs=256)
        and kept.trainable == whole.trainable
    )
    # the initial head goes with the frame, once
    assert bundle.frame_bytes == kept.frame_bytes > whole.frame_bytes
    met = {name for l in run.metrics() for name in l["clients"]}
    assert line["total_bytes"] == 3 * kept.round_bytes + len(met) * kept.frame_bytes
    assert np.array_equal(
        bundle.trained(run.newest().state.arrays)["head.weight"], bundle.initial["head.weight"]
    )
