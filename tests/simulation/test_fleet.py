"""Devices around an exchange: who is asked, who is lost, what a round's line says,
on a coordinator and an engine of a few lines.
"""

from dataclasses import replace

import numpy as np
import pytest

from fedtune.algorithms import fed_avg
from fedtune.algorithms.probes import SCORES, answers, probe_bytes
from fedtune.job import parse_job
from fedtune.round.algorithm import make_algorithm
from fedtune.round.coordinator import start
from fedtune.round.loop import run_rounds
from fedtune.round.replies import Reply
from fedtune.runs.folder import create_run
from fedtune.simulation.fleet import Fleet
from fedtune.types import ClientInfo, TensorSpec
from fedtune.wire import Schema, decode, encode, kind_of, packet_bytes

SCHEMA = Schema((TensorSpec("a.R", (3, 3), "block.0"), TensorSpec("head.bias", (2,), "head")))
FRAME, FRAME_BYTES = "0123456789abcdef", 8000
CLIENTS = tuple(ClientInfo(f"c{i}", 10 * (i + 1)) for i in range(6))
MODEL, UPDATE = packet_bytes(SCHEMA)
EVEN = '{name = "even", speed = 2.0, up-kbps = 8.0, down-kbps = 80.0}'  # 1000 bytes a second up, 10,000 down


def model(value=0.0):
    return {t.name: np.full(t.shape, value, np.float32) for t in SCHEMA.tensors}


@pytest.fixture
def simulated(tmp_path):
    """simulated(devices, changes...) -> (lines of the rounds, clients that the engine was
    given by round, coordinator).
    """

    def run(devices, *changes, step=None, silent=(), again=False):
        job = parse_job(
            "",
            [
                "data.clients=6",
                "federation.cohort=6",
                "federation.rounds=4",
                "federation.deadline=60",
                f"simulation.devices=[{devices}]",
                *changes,
            ],
        )
        folder = create_run(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", job, {})
        fleet, given = Fleet(job, CLIENTS, [step] * len(job.simulation.devices), SCHEMA, 0), {}

        def engine(pairs, kind="train", round=0):
            given[round] = [client for client, _ in pairs]
            for client, packet in reversed(pairs):
                assert len(packet) == MODEL
                if client not in silent:
                    yield Reply(
                        client, encode("update", SCHEMA, model(1.0), round=round, frame=FRAME, weight=1.0)
                    )

        algorithm = fed_avg(
            seed=0, cohort=job.federation.cohort, units=SCHEMA.units, sampling=job.federation.sampling
        )
        coordinator = start(
            job, folder, SCHEMA, FRAME, FRAME_BYTES, algorithm, CLIENTS, model, lambda round, arrays: None
        )
        run_rounds(coordinator, fleet.around(engine), fleet.gather)
        return folder.metrics(), given, coordinator

    return run


def test_a_round_takes_what_its_slowest_client_takes(simulated):
    lines, given, _ = simulated(EVEN)
    slowest = 60 / 2 + MODEL / 10_000 + UPDATE / 1000
    assert [line["simulated_seconds"] for line in lines] == [
        0.0,
        round(slowest + FRAME_BYTES / 10_000, 3),
        *[round(slowest, 3)] * 3,
    ]
    assert all(line["dropped"] == line["stragglers"] == [] for line in lines) and all(
        len(asked) == 6 for asked in given.values()
    )
    tally = lines[2]["devices"]["even"]
    assert tally == {
        "clients": 6,
        "able": 6,
        "available": 6,
        "asked": 6,
        "used": 6,
        "dropped": 0,
        "stragglers": 0,
        "seconds": round(6 * (MODEL / 10_000 + UPDATE / 1000) + 210 / 2, 3),
        "up": 6 * UPDATE,
        "down": 6 * MODEL,
    }


def test_a_client_past_the_deadline_is_not_trained_and_not_used(simulated):
    lines, given, coordinator = simulated(EVEN, "federation.deadline=21")
    # c3: 20 s of training, and the frame in its first round
    late = {1: ["c3", "c4", "c5"], 2: ["c4", "c5"], 3: ["c4", "c5"], 4: ["c4", "c5"]}
    for round_, names in late.items():
        assert lines[round_]["stragglers"] == names and lines[round_]["refused"] == {}
        assert (
            given[round_]
            == sorted(lines[round_]["clients"])
            == [c.name for c in CLIENTS if c.name not in names]
        )
        assert lines[round_]["simulated_seconds"] == 21.0
    assert (
        coordinator.traffic.rounds["c5"] == 4
        and coordinator.traffic.down["c5"] == 4 * MODEL + FRAME_BYTES
        and "c5" not in coordinator.traffic.up
    )


def test_a_client_that_drops_out_costs_the_round_its_deadline(simulated):
    lines, given, coordinator = simulated(EVEN.replace("}", ", drop-out = 0.3}"), "federation.rounds=30")
    dropped = sum(len(line["dropped"]) for line in lines)
    assert 30 <= dropped <= 80  # 180 asked
    for line in lines[1:]:
        assert sorted(line["dropped"] + line["clients"]) == [c.name for c in CLIENTS]
        assert set(line["dropped"]).isdisjoint(given[line["round"]])
        assert (line["simulated_seconds"] == 60.0) == bool(line["dropped"])
        assert line["devices"]["even"]["dropped"] == len(line["dropped"])
    assert sum(line["devices"]["even"]["down"] for line in lines) == sum(coordinator.traffic.down.values())
    assert sum(line["devices"]["even"]["up"] for line in lines) == sum(coordinator.traffic.up.values())


def test_a_round_of_drop_outs_alone_is_void(simulated):
    lines, given, coordinator = simulated('{name = "brick", drop-out = 1.0}')
    assert given == {1: [], 2: [], 3: [], 4: []} and coordinator.state.arrays["a.R"].max() == 0.0
    assert all(
        line["clients"] == [] and len(line["dropped"]) == 6 and line["simulated_seconds"] == 60.0
        for line in lines[1:]
    )


def test_only_those_that_are_available_are_asked(simulated):
    lines, given, _ = simulated(
        '{name = "shy", available = 0.4}', "federation.rounds=40", "federation.cohort=2"
    )
    for line in lines[1:]:
        awake = line["devices"]["shy"]["available"]
        assert len(given[line["round"]]) == min(2, awake)
        # nobody there: the next chance is after the deadline
        assert line["simulated_seconds"] == (0.0 if awake else 60.0)
    assert 40 <= sum(line["devices"]["shy"]["available"] for line in lines[1:]) <= 150  # of 240
    assert len({name for asked in given.values() for name in asked}) == 6


def test_too_little_memory_means_never_asked_and_is_counted(simulated):
    lines, given, _ = simulated(
        '{name = "small", memory-mb = 1}, {name = "large", memory-mb = 2}',
        "federation.cohort=3",
        step=1_500_000,
    )
    small, large = lines[1]["devices"]["small"], lines[1]["devices"]["large"]
    assert (
        small["clients"] + large["clients"] == 6
        and small["clients"] > 0
        and small["able"] == small["available"] == 0
    )
    assert large["able"] == large["clients"] and all(line["devices"]["small"]["asked"] == 0 for line in lines)
    assert {name for asked in given.values() for name in asked} == set(given[1]) or large["clients"] > 3


def test_a_client_that_an_engine_loses_is_refused_as_ever(simulated):
    lines, _, _ = simulated(EVEN, silent=("c2",))
    assert all(
        line["refused"] == {"c2": "no reply"} and line["simulated_seconds"] == 60.0 for line in lines[1:]
    )


def test_the_same_seed_loses_the_same_clients(simulated):
    devices = EVEN.replace("}", ", drop-out = 0.3, available = 0.8}")
    one, two, other = (simulated(devices, f"federation.seed={seed}")[0] for seed in (3, 3, 4))
    assert [line | {"seconds": 0} for line in one] == [line | {"seconds": 0} for line in two]
    assert [line["dropped"] for line in one] != [line["dropped"] for line in other]


def test_a_class_with_a_depth_is_not_asked_and_goes_by_the_mean_of_the_others_down_to_there(tmp_path):
    schema = Schema(
        (
            *(TensorSpec(f"{i}.R", (3, 3), f"block.{i}") for i in range(3)),
            TensorSpec("head.bias", (2,), "head"),
        )
    )
    start_model = {t.name: np.zeros(t.shape, np.float32) for t in schema.tensors}
    job = parse_job(
        "",
        [
            "data.clients=6",
            "federation.cohort=6",
            "federation.rounds=3",
            'simulation.devices=[{name = "whole"}, {name = "part", depth = 2}]',
            "units.strategy=gradient",
            "units.budget=1",
            "units.probe-every=2",
        ],
    )
    fleet, probed, trained = Fleet(job, CLIENTS, [None] * 2, schema, 0), [], {}
    part = {c.name for c in CLIENTS if fleet.limits(c.name).depth}
    assert 0 < len(part) < 6 and fleet.limits("c0").depth == (2 if "c0" in part else 0)

    def engine(pairs, kind="train", round=0):
        for client, packet in pairs:
            if kind_of(packet) == "probe":
                probed.append((round, client))
                yield Reply(
                    client,
                    encode(
                        "block-scores",
                        answers(schema),
                        {SCORES: np.array([4, 3, 1], np.float32)},
                        round=round,
                        frame=FRAME,
                    ),
                )
            else:
                names = trained[round, client] = decode(packet, schema, kinds=["model"]).train
                yield Reply(
                    client,
                    encode(
                        "update",
                        schema,
                        {name: start_model[name] for name in names},
                        round=round,
                        frame=FRAME,
                        weight=1.0,
                    ),
                )

    folder = create_run(tmp_path / "run", job, {})
    coordinator = start(
        job,
        folder,
        schema,
        FRAME,
        0,
        make_algorithm(job, schema, fleet.limits, 6),
        CLIENTS,
        lambda: start_model,
        lambda round, arrays: None,
    )
    run_rounds(coordinator, fleet.around(engine), fleet.gather)
    others = [c.name for c in CLIENTS if c.name not in part]
    assert sorted(probed) == [(round, c) for round in (1, 3) for c in others]
    assert {(c in part, names[0]) for (_, c), names in trained.items()} == {
        (True, "1.R"),
        (False, "0.R"),
    } and len(trained) == 18
    lines = folder.metrics()
    assert (
        lines[1]["unprobed"]
        == lines[3]["unprobed"]
        == dict.fromkeys(part, "not asked, as it cannot go down to the first block")
        and lines[1]["scores"]["block.0"] == 0.5
    )
    assert coordinator.traffic.probes == 2 * len(others) * sum(probe_bytes(schema))
    fleet.can_probe = lambda client: False  # a cohort of none that can: what was found before still stands
    fleet.gather(coordinator)
    coordinator.state = replace(coordinator.state, round=4)
    assert coordinator.probe() == [] and set(coordinator._probe.silent) == {c.name for c in CLIENTS}
    assert {
        client: decode(packet, schema, kinds=["model"]).train[0] for client, packet in coordinator.plan()
    } == {c.name: "1.R" if c.name in part else "0.R" for c in CLIENTS}


def test_a_probe_takes_its_time_and_bytes_and_a_step_on_fewer_blocks_less(tmp_path):
    """Two blocks, of which each client trains one: the upper takes three quarters of a step's
    work, the lower all of it.
    """
    schema = Schema(
        (
            TensorSpec("a.R", (3, 3), "block.0"),
            TensorSpec("b.R", (3, 3), "block.1"),
            TensorSpec("head.bias", (2,), "head"),
        )
    )
    start_model = {t.name: np.zeros(t.shape, np.float32) for t in schema.tensors}
    job = parse_job(
        "",
        [
            "data.clients=6",
            "federation.cohort=6",
            "federation.rounds=2",
            f"simulation.devices=[{EVEN}]",
            "units.strategy=gradient",
            "units.budget=1",
            "units.probe-batches=1",
        ],
    )
    folder, trained = create_run(tmp_path / "run", job, {}), {}
    fleet = Fleet(job, CLIENTS, [None], schema, 0)

    def engine(pairs, kind="train", round=0):
        for client, packet in pairs:
            if kind_of(packet) == "probe":  # c0 to c2 gain most from the lower block
                scores = np.array([3, 1] if client < "c3" else [1, 9], np.float32)
                yield Reply(
                    client,
                    encode("block-scores", answers(schema), {SCORES: scores}, round=round, frame=FRAME),
                )
            else:
                names = trained[round, client] = decode(packet, schema, kinds=["model"]).train
                yield Reply(
                    client,
                    encode(
                        "update",
                        schema,
                        {name: start_model[name] for name in names},
                        round=round,
                        frame=FRAME,
                        weight=1.0,
                    ),
                )

    coordinator = start(
        job,
        folder,
        schema,
        FRAME,
        0,
        make_algorithm(job, schema),
        CLIENTS,
        lambda: start_model,
        lambda round, arrays: None,
    )
    run_rounds(coordinator, fleet.around(engine), fleet.gather)
    (question, answer), lines = probe_bytes(schema), folder.metrics()
    assert {client: names[0] for (round, client), names in trained.items() if round == 1} == {
        f"c{i}": "a.R" if i < 3 else "b.R" for i in range(6)
    }
    # the mean of 3/4, 3/4, 3/4, .1, .1, .1 is below a half
    assert {names[0] for (round, _), names in trained.items() if round == 2} == {"b.R"}
    model, update = packet_bytes(schema, ("a.R", "head.bias"))
    probing, exchange = 16 / 2 + question / 10_000 + answer / 1000, model / 10_000 + update / 1000
    assert lines[1]["simulated_seconds"] == pytest.approx(probing + 60 * 0.75 / 2 + exchange, abs=2e-3)
    assert lines[2]["simulated_seconds"] == pytest.approx(60 * 0.75 / 2 + exchange, abs=2e-3)
    tally, after = lines[1]["devices"]["even"], lines[2]["devices"]["even"]
    assert (tally["down"] - after["down"], tally["up"] - after["up"]) == (
        6 * question,
        6 * answer,
    ) and coordinator.traffic.probes == 6 * (question + answer)
    assert sum(coordinator.traffic.down.values()) == tally["down"] + after["down"]
