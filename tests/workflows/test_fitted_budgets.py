"""Blocks that follow from memory and time: against the memory that a plan computes for each number
of blocks, and a division.
"""

import numpy as np
import pytest

from fedtune.algorithms.base import State
from fedtune.algorithms.probes import probe_bytes
from fedtune.algorithms.units import Limits, budgets, step_share
from fedtune.errors import JobError
from fedtune.round.algorithm import make_algorithm
from fedtune.training.memory import step_memory
from fedtune.types import ClientInfo, TensorSpec
from fedtune.wire import Schema
from fedtune.workflows.budgets import fitted, mean_examples
from fedtune.workflows.plan import make_plan
from fedtune.workflows.setup import open_setup

SIX = Schema(tuple(TensorSpec(unit, (2,), unit) for unit in (*(f"block.{i}" for i in range(6)), "head")))


def devices(*classes):
    return (
        "simulation.devices=["
        + ", ".join("{" + f'name = "{chr(97 + i)}", {text}' + "}" for i, text in enumerate(classes))
        + "]"
    )


def units_of(job):
    return [device.units for device in job.simulation.devices]


def depths_of(job):
    return [device.depth for device in job.simulation.devices]


def unknown(limits):
    return None


@pytest.mark.parametrize("strategy", ["top", "lisa"])
def test_memory_holds_a_step_of_the_blocks_and_of_no_more(strategy, tiny_job):
    """Steps of one, two, ... blocks need 1, 2, ...

    MB; of each class as many are taken as its memory holds.
    """
    job = tiny_job(
        f"units.strategy={strategy}",
        "units.budget=5",
        "units.fit=true",
        devices("memory-mb=3", "memory-mb=9", "memory-mb=4, units=2", "memory-mb=1", "speed=1.0"),
    )
    asked = []

    def memory(limits):
        assert limits.depth == 0
        asked.append(limits.blocks)
        return limits.blocks * 10**6

    found = fitted(job, SIX, memory, 100)
    assert units_of(found) == [3, 5, 2, 1, 5] and len(asked) < 15
    assert fitted(found, SIX, memory, 100) == found and budgets(found) == (5, 3, 2, 1)


def test_seconds_are_those_of_the_forward_pass_and_of_the_backward_pass_to_the_lowest(tiny_job):
    changes = ("units.budget=6", "units.fit=true", devices("speed=10", "speed=100", "speed=1"))
    top = fitted(tiny_job("units.strategy=top", "units.seconds=7.5", *changes), SIX, unknown, 100)
    shares = [step_share(SIX, (*SIX.blocks[6 - b :], "head")) for b in range(1, 7)]
    assert shares == pytest.approx([7 / 12, 8 / 12, 9 / 12, 10 / 12, 11 / 12, 1])
    assert units_of(top) == [3, 6, 1]  # 10 seconds for a whole step's work
    bottom = fitted(tiny_job("units.strategy=bottom", "units.seconds=10", *changes), SIX, unknown, 100)
    assert units_of(bottom) == [6, 6, 1]  # the first block is always the lowest: all cost the same


def activations_and_states(limits):
    """A MB for each block that is gone through, 100 kB for each that is trained."""
    return limits.depth * 10**6 + limits.blocks * 10**5


@pytest.mark.parametrize(
    "budget, blocks, depths", [(2, [2, 2, 1, 2, 1], [2, 6, 1, 4, 3]), (0, [2, 6, 1, 4, 1], [2, 6, 1, 4, 3])]
)
def test_of_blocks_by_scores_first_the_number_and_then_the_depth(budget, blocks, depths, tiny_job):
    """Against every pair there is; the third class has too little for one, and the last may train one."""
    megabytes = {
        "memory-mb=3": 3,
        "memory-mb=90": 90,
        "memory-mb=1": 1,
        "memory-mb=9, depth=4": 9,
        "memory-mb=4, units=1": 4,
    }
    job = tiny_job("units.strategy=gradient", f"units.budget={budget}", "units.fit=true", devices(*megabytes))
    found = fitted(job, SIX, activations_and_states, 100)
    assert (units_of(found), depths_of(found)) == (blocks, depths)
    for device, own, limit in zip(found.simulation.devices, job.simulation.devices, megabytes.values()):
        pairs = [
            (b, d)
            for d in range(1, (own.depth or 6) + 1)
            for b in range(1, min(d, own.units or budget or 6) + 1)
            if activations_and_states(Limits(b, d)) <= limit * 10**6
        ]
        assert (device.units, device.depth) == max(pairs, default=(1, 1))
    assert fitted(found, SIX, activations_and_states, 100) == found


def test_seconds_limit_the_depth(tiny_job):
    job = tiny_job(
        "units.strategy=fisher",
        "units.budget=2",
        "units.fit=true",
        "units.seconds=7.5",
        devices("speed=10", "speed=100", "speed=1"),
    )
    found = fitted(job, SIX, unknown, 100)
    assert (units_of(found), depths_of(found)) == ([2, 2, 1], [3, 6, 1])


def test_somebody_must_be_able_to_answer_a_probe(tiny_job):
    job = tiny_job(
        "units.strategy=snr", "units.budget=1", "units.fit=true", devices("memory-mb=4", "memory-mb=5")
    )
    said = (
        r'units\.strategy = "snr": a probe takes the backward pass through all 6 blocks, '
        r"and no class of simulation\.devices can go deeper than 4; give one more memory-mb"
    )
    with pytest.raises(JobError, match=said):
        fitted(job, SIX, activations_and_states, 100)
    assert depths_of(
        fitted(
            tiny_job("units.strategy=lisa", "units.budget=1", "units.fit=true", devices("memory-mb=4")),
            SIX,
            activations_and_states,
            100,
        )
    ) == [0]


def test_memory_that_is_not_known_is_refused(tiny_job):
    job = tiny_job("units.strategy=top", "units.budget=2", "units.fit=true", devices("memory-mb=3"))
    with pytest.raises(
        JobError,
        match=(
            r"units\.fit = true: what a step of this base needs cannot be computed from shapes; "
            r"set it to false and give each class"
        ),
    ):
        fitted(job, SIX, unknown, 100)
    with pytest.raises(
        JobError, match=r"units\.budget = 2: 1 blocks of this base have trained tensors; lower it"
    ):
        fitted(job, Schema(SIX.tensors[:1]), lambda limits: 1, 100)


@pytest.mark.parametrize("strategy", ["top", "lisa", "gradient"])
def test_live_where_nothing_is_fitted_no_budget_is_all_blocks(strategy, tiny_job):
    job = tiny_job(f"units.strategy={strategy}", "units.fit=true", devices("memory-mb=3"))
    state = State(0, {t.name: np.zeros(t.shape) for t in SIX.tensors})
    (assigned,) = make_algorithm(job, SIX).plan(state, [ClientInfo("a", 5)])
    assert assigned.units == SIX.units


def test_simulation_and_plan_take_the_same_number(tiny_job, run_rounds, tmp_path):
    """The tiny base, whose two blocks need more than one, and a class with memory for just one."""
    plain = open_setup(tiny_job("units.strategy=top", "units.budget=2", "federation.batch-size=256"))
    one, two = (
        step_memory(plain.job, plain.spec, plain.fresh_model(), Limits(budget))["total"] for budget in (1, 2)
    )
    assert one < two
    limit = -(-one // 10**6)
    if limit * 10**6 >= two:
        pytest.fail("the tiny base no longer tells one block from two by whole megabytes")
    job = tiny_job(
        "units.strategy=top",
        "units.budget=2",
        "units.fit=true",
        "federation.batch-size=256",
        "federation.rounds=1",
        "federation.cohort=6",
        devices(f"memory-mb={limit}", "memory-mb=9000"),
    )
    simulation = run_rounds(job, tmp_path / "run")
    assert units_of(simulation.setup.job) == [1, 2]
    counts = simulation.run.metrics()[1]["units"]
    assert counts["head"] == counts["block.1"] == 6 > counts["block.0"] > 0
    plan = make_plan(job)
    assert [d.able for d in plan.devices] == [True, True]
    assert mean_examples(simulation.setup.split, job.federation) == pytest.approx(
        sum(len(p) for p in simulation.setup.split.train) / 6
    )


def test_a_class_that_reaches_the_upper_block_is_not_probed_and_trains_it(tiny_job, run_rounds, tmp_path):
    """By memory: of the tiny base's two blocks the lower would need more."""
    changes = (
        "units.strategy=gradient",
        "units.budget=1",
        "federation.batch-size=256",
        "units.probe-every=2",
    )
    plain = open_setup(tiny_job(*changes))
    upper, lower = (
        step_memory(plain.job, plain.spec, plain.fresh_model(), Limits(1, depth))["total"] for depth in (1, 2)
    )
    limit = -(-upper // 10**6)
    if limit * 10**6 >= lower:
        pytest.fail("the tiny base no longer tells the upper block from both by whole megabytes")
    job = tiny_job(
        *changes,
        "units.fit=true",
        "federation.rounds=2",
        "federation.cohort=6",
        devices(f"memory-mb={limit}", "memory-mb=9000"),
    )
    simulation = run_rounds(job, tmp_path / "run")
    made, fleet, lines = simulation.setup.job, simulation.fleet, simulation.run.metrics()
    assert units_of(made) == [1, 1] and depths_of(made) == [1, 2]
    small = [c for c in simulation.setup.split.clients if fleet.limits(c).depth == 1]
    assert 0 < len(small) < 6 and lines[1]["unprobed"] == dict.fromkeys(
        small, "not asked, as it cannot go down to the first block"
    )
    assert lines[1]["units"]["head"] == 6 and sum(lines[1]["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert lines[1]["units"]["block.1"] >= len(small)
    assert simulation.run.newest().counters["probes"] == (6 - len(small)) * sum(
        probe_bytes(simulation.setup.schema)
    )
    plan = make_plan(job)
    assert [(d.blocks, d.depth, d.probed, d.able) for d in plan.devices] == [
        (1, 1, False, True),
        (1, 2, True, True),
    ] and plan.devices[0].probe is None
    alone = tiny_job(*changes, "units.fit=true", devices(f"memory-mb={limit}"))
    with pytest.raises(JobError, match="a probe takes the backward pass through all 2 blocks"):
        make_plan(alone)
    with pytest.raises(JobError, match="a probe takes the backward pass through all 2 blocks"):
        open_setup(alone)
