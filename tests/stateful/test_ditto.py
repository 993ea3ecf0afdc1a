"""Ditto: the global model is FedAvg's, and each client's own model the one of the loss with its
term, round after round.
"""

import numpy as np
import pytest
import torch
from plain_steps import SGD, Plain, near

LAMBDA = 2.0
DITTO = ("personal.method=ditto", f"personal.strength={LAMBDA}")


@pytest.fixture(scope="module")
def ran(tiny_job, run_rounds, tmp_path_factory):
    return run_rounds(tiny_job(*SGD, *DITTO, "federation.rounds=4"), tmp_path_factory.mktemp("ditto") / "run")


def test_both_models_are_those_of_a_plain_loop(ran):
    plain = Plain(ran.setup.job)
    w, own = plain.first, {}
    for round in range(1, 5):
        names, start = plain.cohort(round), {n: torch.from_numpy(a) for n, a in w.items()}
        updates = [plain.walk(w, name, round)[0] for name in names]
        for name in names:
            own[name] = plain.walk(
                own.get(name, w),
                name,
                round,
                "personal",
                lambda n, p: LAMBDA / 2 * ((p - start[n]) ** 2).sum(),  # noqa: B023
            )[0]
        w = plain.mean(updates, [plain.size(name) for name in names])
    near(ran.run.newest().state.arrays, w)
    assert set(ran.kept.clients(ran.setup.split.clients, 4)) == set(own) and len(own) > 2
    for name, v in own.items():
        near(ran.kept.load(name, 4), v)
        assert max(np.abs(v[n] - w[n]).max() for n in w) > 0.01
    parts, line = plain.setup.split, ran.run.metrics()[-1]
    right = {name: plain.right(v, parts.held_out[parts.clients.place(name)]) for name, v in own.items()}
    examples = sum(len(parts.held_out[parts.clients.place(name)]) for name in own)
    assert (line["personal_clients"], line["personal_evaluated"]) == (len(own), examples) and line[
        "personal_accuracy"
    ] == pytest.approx(sum(right.values()) / examples)


def test_the_global_model_and_its_bytes_are_those_without(ran, tiny_job, run_rounds, tmp_path):
    without = run_rounds(tiny_job(*SGD, "federation.rounds=4"), tmp_path / "run").run
    ours, theirs = ran.run.newest(), without.newest()
    assert (
        all(ours.state.arrays[n].tobytes() == a.tobytes() for n, a in theirs.state.arrays.items())
        and ours.counters == theirs.counters
    )
    assert (
        ran.run.ledger.read_bytes() == without.ledger.read_bytes()
        and "personal_accuracy" not in without.metrics()[-1]
    )


def test_a_stronger_pull_stays_nearer(tiny_job, run_rounds, tmp_path):
    distance = {}
    for strength in (0.0, 4.0):
        found = run_rounds(
            tiny_job(*SGD, "personal.method=ditto", f"personal.strength={strength}", "federation.rounds=1"),
            tmp_path / str(strength),
        )
        first = found.run.first_arrays()
        distance[strength] = sum(
            float(((found.kept.load(name, 1)[n] - a) ** 2).sum())
            for name in found.kept.clients(found.setup.split.clients, 1)
            for n, a in first.items()
        )
    assert 0 < distance[4.0] < distance[0.0]
