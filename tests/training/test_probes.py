"""What a probe says of the blocks, against gradients that autograd gives for one batch, or one example, at
a time; and rounds that begin with one.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtune.adapters.methods import write
from fedtune.algorithms.probes import SCORES, answers, block_scores, probe_bytes
from fedtune.algorithms.units import ROWS, by_common_scores
from fedtune.common.seeds import generator
from fedtune.errors import Refused
from fedtune.round.batches import local_batches
from fedtune.round.replies import Reply
from fedtune.runs.folder import open_run
from fedtune.training.local import to_batch
from fedtune.types import RoundReport, TensorSpec
from fedtune.units.strategies import STRATEGIES
from fedtune.wire import Schema, decode, encode

PROBED = ("units.budget=1", "units.probe-batches=3", "units.probe-every=2")


@pytest.fixture(scope="module", params=("fed-sb", "bias"))
def simulations(request, tiny_job, run_rounds, tmp_path_factory):
    """By strategy, each after two rounds."""
    made = {}

    def of(strategy):
        if strategy not in made:
            job = tiny_job(
                f"adapter.method={request.param}",
                f"units.strategy={strategy}",
                *PROBED,
                "federation.rounds=2",
            )
            made[strategy] = run_rounds(job, tmp_path_factory.mktemp(strategy) / "run")
        return made[strategy]

    return of


def by_autograd(simulation, model, data, strategy, client, round):
    """Written out: a gradient per batch (fisher: per example), stacked, then the formula."""
    worker, fed, schema = simulation.worker, simulation.setup.job.federation, simulation.setup.schema
    write(worker.parameters, model)
    batches = list(
        local_batches(data.lengths, fed.batch_size, 1, 3, generator(fed.seed, "probe", round, client))
    )
    if strategy == "fisher":
        batches = [np.array([place]) for batch in batches for place in batch]
    scores = []
    for unit in schema.blocks:
        tensors = [worker.parameters[t.name] for t in schema.of_units([unit])]
        rows = []
        for batch in batches:
            inputs, labels = to_batch(data, batch, worker.encoder)
            loss = torch.nn.functional.cross_entropy(worker.model(**inputs), labels)
            rows.append(torch.autograd.grad(loss, tensors))
        per_tensor = [torch.stack(parts).double() for parts in zip(*rows)]
        if strategy in ("gradient", "rgn"):
            score = sum(p.square().sum() for p in per_tensor) / len(batches)
        elif strategy == "fisher":
            score = sum(p.square().mean(0).norm() for p in per_tensor)
        else:
            flat = torch.cat([p.flatten(1) for p in per_tensor], 1)
            score = (flat.mean(0).square() / (flat.var(0, unbiased=False) + 1e-8)).mean()
        if strategy == "rgn":
            base = simulation.setup.fresh_model().body.encoder.layer[int(unit.removeprefix("block."))]
            score = score / sum(p.double().square().sum() for p in base.parameters())
        scores.append(float(score.detach()))
    return scores


@pytest.mark.parametrize("strategy", ["gradient", "rgn", "snr", "fisher"])
def test_scores_are_those_of_autograd(strategy, simulations):
    simulation = simulations(strategy)
    worker, schema, client = simulation.worker, simulation.setup.schema, simulation.setup.split.clients[0]
    bundle, data, model = (
        worker.open(),
        simulation.setup.store.train(client),
        simulation.run.newest().state.arrays,
    )
    question = encode("probe", schema, model, round=3, frame=bundle.frame_digest)
    answer = worker.handle(question, client, data)
    assert (len(question), len(answer)) == probe_bytes(schema)
    found = decode(
        answer, answers(schema), kinds=["block-scores"], round=3, frame=bundle.frame_digest
    ).arrays[SCORES]
    assert worker.handle(question, client, data) == answer
    assert all(p.requires_grad and p.grad is None for p in worker.parameters.values())
    np.testing.assert_allclose(found, by_autograd(simulation, model, data, strategy, client, 3), rtol=2e-4)


def test_each_client_trains_what_matters_most_for_it(simulations):
    simulation = simulations("gradient")
    lines, schema = simulation.run.metrics(), simulation.setup.schema
    always = [u for u in schema.units if u not in schema.blocks]
    each = 2 * (1 + len(always))  # two clients, a block each
    assert [("scores" in line, sum(line.get("units", {}).values())) for line in lines] == [
        (False, 0),
        (True, each),
        (False, each),
    ]
    assert sum(lines[1]["scores"].values()) == pytest.approx(1, abs=1e-5)
    state = simulation.run.newest().state
    common = by_common_scores(simulation.setup.job, schema, state)
    best = schema.blocks[int(np.argmax(state.slots[ROWS].mean(0)))]
    assert common == tuple(u for u in schema.units if u in (best, *always)) and set(lines[2]["units"]) == set(
        common
    )
    counters = simulation.run.newest().counters
    assert counters["probes"] == 2 * sum(probe_bytes(schema)) and counters["probes"] < sum(
        counters["up"].values()
    ) + sum(counters["down"].values())


def test_a_probe_is_answered_only_in_a_job_that_probes(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(tiny_job("federation.rounds=1"), tmp_path / "run")
    worker, schema, client = simulation.worker, simulation.setup.schema, simulation.setup.split.clients[0]
    bundle = worker.open()
    question = encode(
        "probe", schema, simulation.run.newest().state.arrays, round=1, frame=bundle.frame_digest
    )
    with pytest.raises(Refused, match=r'a probe is asked for, and units\.strategy = "all" needs none'):
        worker.handle(question, client, simulation.setup.store.train(client))


def test_missing_and_wrong_answers_go_by_the_mean_of_the_others(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(
        tiny_job("units.strategy=gradient", *PROBED, "federation.rounds=1", "federation.cohort=5"),
        tmp_path / "run",
    )
    coordinator = simulation.coordinator(lambda *a, **k: iter(()))
    every = coordinator.job.units.model_copy(update={"probe_every": 1})
    coordinator.fixed = replace(coordinator.fixed, job=coordinator.job.model_copy(update={"units": every}))
    frame = coordinator.fixed.frame
    asked, expected = [client for client, _ in coordinator.probe()], answers(coordinator.schema)

    def answer(values, round=2):
        return encode(
            "block-scores", expected, {SCORES: np.array(values, np.float32)}, round=round, frame=frame
        )

    before = coordinator.traffic.dump()
    replies = [
        Reply(asked[0], answer([1, 3])),
        Reply(asked[1], None, "drop-out"),
        Reply(asked[2], answer([-1, 2])),
        Reply(asked[3], answer([9, 1], round=1)),
        Reply(asked[4], answer([1, 1])),
        Reply(asked[4], answer([1, 9])),
        Reply("stranger", answer([9, 1])),
        Reply(asked[0], answer([9, 1]), late=True),
    ]
    coordinator.probed(replies)
    mean = [0.375, 0.625]
    np.testing.assert_allclose(coordinator.state.slots[ROWS], [[0.25, 0.75], mean, mean, mean, [0.5, 0.5]])
    after = coordinator.traffic
    assert (
        after.probes - before["probes"] == sum(r.length for r in replies[:5])
        and after.late == before["late"] + 1
    )
    assert coordinator._probe.silent == {
        asked[1]: "drop-out",
        asked[2]: "scores: a negative one",
        asked[3]: "round: reply to round 1, this is round 2",
    }
    planned = {
        client: decode(packet, coordinator.schema, kinds=["model"]).train
        for client, packet in coordinator.plan()
    }
    tops = {client: any(".layer.1." in name for name in names) for client, names in planned.items()}
    assert all(tops.values())
    coordinator.probed([])
    np.testing.assert_allclose(
        coordinator.state.slots[ROWS],
        np.tile(np.mean([[0.25, 0.75], mean, mean, mean, [0.5, 0.5]], 0), (5, 1)),
    )


def test_a_silent_first_probe_takes_the_upper_blocks(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(
        tiny_job("units.strategy=snr", *PROBED, "units.probe-every=1", "federation.rounds=1"),
        tmp_path / "run",
    )
    coordinator = simulation.coordinator(lambda *a, **k: iter(()))
    state = coordinator.state
    coordinator.state = type(state)(state.round, state.arrays, {})
    coordinator.probe()
    coordinator.probed([])
    line = coordinator._trained(RoundReport(1, (), 0.0, {}))
    assert "scores" not in line and line["unprobed"] == dict.fromkeys(coordinator._probe.asked, "no reply")
    for _, packet in coordinator.plan():
        assert not any(
            ".layer.0." in name for name in decode(packet, coordinator.schema, kinds=["model"]).train
        )
    assert open_run(simulation.run.path).newest().state.round == 1


def test_one_gradient_is_no_signal_to_noise_ratio_and_rgn_needs_the_weights():
    schema = Schema((TensorSpec("a.R", (2, 2), "block.0"), TensorSpec("b.R", (2, 2), "block.1")))
    gradients = [
        {"a.R": np.full((2, 2), i + 1.0, np.float32), "b.R": np.full((2, 2), 5.0, np.float32)}
        for i in range(2)
    ]
    assert (
        block_scores("snr", schema, gradients[:1], {})[SCORES].tolist()
        == [0, 0]
        == block_scores("gradient", schema, [], {})[SCORES].tolist()
    )
    assert block_scores("snr", schema, gradients, {})[SCORES] == pytest.approx(
        [2.25 / (0.25 + 1e-8), 25 / 1e-8]
    )
    assert block_scores("rgn", schema, gradients, {"block.0": 2.0, "block.1": 4.0})[SCORES].tolist() == [
        5.0,
        25.0,
    ]
    with pytest.raises(Refused, match="does not say how large the base's blocks are"):
        block_scores("rgn", schema, gradients, {"block.0": 2.0})


@pytest.mark.parametrize("strategy", ["gradient", "fisher", "snr"])
def test_a_probe_keeps_what_a_plan_counts(strategy):
    """Sums of one tensor's gradients, in float32 numbers for each of its own."""
    score = STRATEGIES[strategy].score
    assert score.part(np.ones((50, 40), np.float32)).nbytes // 4 // 2000 == score.kept
