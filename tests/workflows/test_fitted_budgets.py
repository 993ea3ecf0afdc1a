"""Blocks that follow from memory and time: against the memory that a plan computes for each number of blocks, and a division."""

import numpy as np
import pytest

from fedtune.algorithms.base import State
from fedtune.algorithms.units import budgets, step_share
from fedtune.errors import JobError
from fedtune.rounds import make_algorithm
from fedtune.training.memory import step_memory
from fedtune.types import ClientInfo, TensorSpec
from fedtune.wire import Schema
from fedtune.workflows.budgets import fitted, mean_examples
from fedtune.workflows.plan import make_plan
from fedtune.workflows.setup import open_setup

SIX = Schema(tuple(TensorSpec(unit, (2,), unit) for unit in (*(f"block.{i}" for i in range(6)), "head")))


def devices(*classes):
    return "simulation.devices=[" + ", ".join("{" + f'name = "{chr(97 + i)}", {text}' + "}" for i, text in enumerate(classes)) + "]"


def units_of(job):
    return [device.units for device in job.simulation.devices]


@pytest.mark.parametrize("strategy", ["top", "gradient"])
def test_memory_holds_a_step_of_the_blocks_and_of_no_more(strategy, tiny_job):
    """Steps of one, two, ... blocks need 1, 2, ... MB; of each class as many are taken as its memory holds."""
    job = tiny_job(f"units.strategy={strategy}", "units.budget=5", "units.fit=true", devices("memory-mb=3", "memory-mb=9", "memory-mb=4, units=2", "memory-mb=1", "speed=1.0"))
    asked = []

    def memory(blocks, rank):
        asked.append(blocks)
        return blocks * 10**6

    found = fitted(job, SIX, memory, 100)
    assert units_of(found) == [3, 5, 2, 1, 5] and len(asked) < 15
    assert fitted(found, SIX, memory, 100) == found and budgets(found) == (5, 3, 2, 1)


def test_seconds_are_those_of_the_forward_pass_and_of_the_backward_pass_to_the_lowest(tiny_job):
    changes = ("units.budget=6", "units.fit=true", devices("speed=10", "speed=100", "speed=1"))
    top = fitted(tiny_job("units.strategy=top", "units.seconds=7.5", *changes), SIX, lambda b, rank: None, 100)
    shares = [step_share(SIX, (*SIX.blocks[6 - b :], "head")) for b in range(1, 7)]
    assert shares == pytest.approx([7 / 12, 8 / 12, 9 / 12, 10 / 12, 11 / 12, 1])
    assert units_of(top) == [3, 6, 1]  # 10 seconds for a whole step's work
    bottom = fitted(tiny_job("units.strategy=bottom", "units.seconds=10", *changes), SIX, lambda b, rank: None, 100)
    assert units_of(bottom) == [6, 6, 1]  # the first block is always the lowest: all cost the same


def test_memory_that_is_not_known_is_refused(tiny_job):
    job = tiny_job("units.strategy=top", "units.budget=2", "units.fit=true", devices("memory-mb=3"))
    with pytest.raises(JobError, match=r"units\.fit = true: what a step of this base needs cannot be computed from shapes; set it to false and give each class"):
        fitted(job, SIX, lambda blocks, rank: None, 100)
    with pytest.raises(JobError, match=r"units\.budget = 2: 1 blocks of this base have trained tensors; lower it"):
        fitted(job, Schema(SIX.tensors[:1]), lambda blocks, rank: 1, 100)


@pytest.mark.parametrize("strategy", ["top", "lisa", "gradient"])
def test_live_where_nothing_is_fitted_no_budget_is_all_blocks(strategy, tiny_job):
    job = tiny_job(f"units.strategy={strategy}", "units.fit=true", devices("memory-mb=3"))
    state = State(0, {t.name: np.zeros(t.shape) for t in SIX.tensors})
    (assigned,) = make_algorithm(job, SIX).plan(state, [ClientInfo("a", 5)])
    assert assigned.units == SIX.units


def test_simulation_and_plan_take_the_same_number(tiny_job, run_rounds, tmp_path):
    """The tiny base, whose two blocks need more than one, and a class with memory for just one."""
    plain = open_setup(tiny_job("units.strategy=top", "units.budget=2", "federation.batch-size=256"))
    one, two = (step_memory(plain.job, plain.spec, plain.fresh_model(), budget)["total"] for budget in (1, 2))
    assert one < two
    limit = -(-one // 10**6)
    if limit * 10**6 >= two:
        pytest.fail("the tiny base no longer tells one block from two by whole megabytes")
    job = tiny_job("units.strategy=top", "units.budget=2", "units.fit=true", "federation.batch-size=256", "federation.rounds=1", "federation.cohort=6",
                   devices(f"memory-mb={limit}", "memory-mb=9000"))
    simulation = run_rounds(job, tmp_path / "run")
    assert units_of(simulation.setup.job) == [1, 2]
    counts = simulation.run.metrics()[1]["units"]
    assert counts["head"] == counts["block.1"] == 6 > counts["block.0"] > 0
    plan = make_plan(job)
    assert [d.able for d in plan.devices] == [True, True]
    assert mean_examples(simulation.setup.split, job.federation) == pytest.approx(sum(len(p) for p in simulation.setup.split.train) / 6)
