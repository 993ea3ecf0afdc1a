"""Devices around an exchange: who is asked, who is lost, what a round's line says, on a coordinator and an engine of a few lines."""

import numpy as np
import pytest

from fedtune.algorithms import fed_avg
from fedtune.job import parse_job
from fedtune.rounds import Reply, start
from fedtune.run import create_run
from fedtune.server.app import run_rounds
from fedtune.simulation.fleet import Fleet
from fedtune.types import ClientInfo, TensorSpec
from fedtune.wire import Schema, encode, packet_bytes

SCHEMA = Schema((TensorSpec("a.R", (3, 3), "block.0"), TensorSpec("head.bias", (2,), "head")))
FRAME, FRAME_BYTES = "0123456789abcdef", 8000
CLIENTS = tuple(ClientInfo(f"c{i}", 10 * (i + 1)) for i in range(6))
MODEL, UPDATE = packet_bytes(SCHEMA)
EVEN = '{name = "even", speed = 2.0, up-kbps = 8.0, down-kbps = 80.0}'  # 1000 bytes a second up, 10,000 down


def model(value=0.0):
    return {t.name: np.full(t.shape, value, np.float32) for t in SCHEMA.tensors}


@pytest.fixture
def simulated(tmp_path):
    """simulated(devices, changes...) -> (lines of the rounds, clients that the engine was given by round, coordinator)."""

    def run(devices, *changes, step=None, silent=(), again=False):
        job = parse_job("", ["data.clients=6", "federation.cohort=6", "federation.rounds=4", "federation.deadline=60", f"simulation.devices=[{devices}]", *changes])
        folder = create_run(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", job, {})
        fleet, given = Fleet(job, CLIENTS, [step] * len(job.simulation.devices), lambda round, budget: UPDATE, 0), {}

        def engine(pairs, kind="train", round=0):
            given[round] = [client for client, _ in pairs]
            for client, packet in reversed(pairs):
                assert len(packet) == MODEL
                if client not in silent:
                    yield Reply(client, encode("update", SCHEMA, model(1.0), round=round, frame=FRAME, weight=1.0))

        algorithm = fed_avg(seed=0, cohort=job.federation.cohort, units=SCHEMA.units, sampling=job.federation.sampling)
        coordinator = start(job, folder, SCHEMA, FRAME, FRAME_BYTES, algorithm, CLIENTS, model, lambda round, arrays: None)
        run_rounds(coordinator, fleet.around(engine), fleet.gather)
        return folder.metrics(), given, coordinator

    return run


def test_a_round_takes_what_its_slowest_client_takes(simulated):
    lines, given, _ = simulated(EVEN)
    slowest = 60 / 2 + MODEL / 10_000 + UPDATE / 1000
    assert [line["simulated_seconds"] for line in lines] == [0.0, round(slowest + FRAME_BYTES / 10_000, 3), *[round(slowest, 3)] * 3]
    assert all(line["dropped"] == line["stragglers"] == [] for line in lines) and all(len(asked) == 6 for asked in given.values())
    tally = lines[2]["devices"]["even"]
    assert tally == {
        "clients": 6, "able": 6, "available": 6, "asked": 6, "used": 6, "dropped": 0, "stragglers": 0,
        "seconds": round(6 * (MODEL / 10_000 + UPDATE / 1000) + 210 / 2, 3), "up": 6 * UPDATE, "down": 6 * MODEL}


def test_a_client_past_the_deadline_is_not_trained_and_not_used(simulated):
    lines, given, coordinator = simulated(EVEN, "federation.deadline=21")
    late = {1: ["c3", "c4", "c5"], 2: ["c4", "c5"], 3: ["c4", "c5"], 4: ["c4", "c5"]}  # c3: 20 s of training, and the frame in its first round
    for round_, names in late.items():
        assert lines[round_]["stragglers"] == names and lines[round_]["refused"] == {}
        assert given[round_] == sorted(lines[round_]["clients"]) == [c.name for c in CLIENTS if c.name not in names]
        assert lines[round_]["simulated_seconds"] == 21.0
    assert coordinator.traffic.rounds["c5"] == 4 and coordinator.traffic.down["c5"] == 4 * MODEL + FRAME_BYTES and "c5" not in coordinator.traffic.up


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
    assert all(line["clients"] == [] and len(line["dropped"]) == 6 and line["simulated_seconds"] == 60.0 for line in lines[1:])


def test_only_those_that_are_available_are_asked(simulated):
    lines, given, _ = simulated('{name = "shy", available = 0.4}', "federation.rounds=40", "federation.cohort=2")
    for line in lines[1:]:
        awake = line["devices"]["shy"]["available"]
        assert len(given[line["round"]]) == min(2, awake)
        assert line["simulated_seconds"] == (0.0 if awake else 60.0)  # nobody there: the next chance is after the deadline
    assert 40 <= sum(line["devices"]["shy"]["available"] for line in lines[1:]) <= 150  # of 240
    assert len({name for asked in given.values() for name in asked}) == 6


def test_too_little_memory_means_never_asked_and_is_counted(simulated):
    lines, given, _ = simulated('{name = "small", memory-mb = 1}, {name = "large", memory-mb = 2}', "federation.cohort=3", step=1_500_000)
    small, large = lines[1]["devices"]["small"], lines[1]["devices"]["large"]
    assert small["clients"] + large["clients"] == 6 and small["clients"] > 0 and small["able"] == small["available"] == 0
    assert large["able"] == large["clients"] and all(line["devices"]["small"]["asked"] == 0 for line in lines)
    assert {name for asked in given.values() for name in asked} == set(given[1]) or large["clients"] > 3


def test_a_client_that_an_engine_loses_is_refused_as_ever(simulated):
    lines, _, _ = simulated(EVEN, silent=("c2",))
    assert all(line["refused"] == {"c2": "no reply"} and line["simulated_seconds"] == 60.0 for line in lines[1:])


def test_the_same_seed_loses_the_same_clients(simulated):
    devices = EVEN.replace("}", ", drop-out = 0.3, available = 0.8}")
    one, two, other = (simulated(devices, f"federation.seed={seed}")[0] for seed in (3, 3, 4))
    assert [line | {"seconds": 0} for line in one] == [line | {"seconds": 0} for line in two]
    assert [line["dropped"] for line in one] != [line["dropped"] for line in other]
