"""fedtune's own engines: a Simulation as `fedtune simulate` runs it, stopped after each round until the driver wants the next."""

import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contenders.serve import Commands, Stopwatch
from contenders.work import CASES, Order, moved, open_case
from fedtune.job import job_from
from fedtune.rounds import Watch
from fedtune.run import create_run
from fedtune.training import cohort, worker
from fedtune.types import Metrics
from fedtune.workflows.setup import Setup
from fedtune.workflows.simulate import Simulation


class Over(Exception):
    """The driver wants no more rounds."""


def run(order: Order, engine: str) -> None:
    commands = Commands()
    setup = with_engine(open_case(order.case, order.cohort), engine, order.threads)
    if CASES[order.case].idle:
        make_idle()
    run = create_run(Path(order.folder), setup.job, {"created": "", "versions": {}, "sha256": setup.sha256, "split": []})
    simulation = Simulation(setup, run)
    simulation.watch = Watch(line=Pace(commands, simulation))
    with contextlib.suppress(Over):
        simulation.rounds()


def with_engine(setup: Setup, engine: str, threads: int) -> Setup:
    """The same setup for another engine."""
    raw = setup.job.model_dump(by_alias=True, exclude_unset=True)
    job = job_from(raw | {"simulation": {"engine": engine, "threads": threads}})
    fields = {name: getattr(setup, name) for name in type(setup).__dataclass_fields__}
    return type(setup)(**fields | {"job": job})


def make_idle() -> None:
    """Clients of this process take the model, train nothing and return it."""
    def nothing(*args: Any) -> Metrics:
        return {"loss": (0.0, 1.0), "accuracy": (0.0, 1.0)}

    def together(self: cohort.CohortTrainer, start: np.ndarray, tasks: Sequence[object], round: int) -> tuple[np.ndarray, np.ndarray]:
        return np.tile(start, (len(tasks), 1)), np.tile([0.0, 0.0, 1.0], (len(tasks), 1))

    worker.train_locally = nothing
    cohort.CohortTrainer.train = together


class Pace:
    """Called after each round: counts, answers, and waits for the next command."""

    def __init__(self, commands: Commands, simulation: Simulation) -> None:
        self.commands, self.simulation = commands, simulation
        self.left, self.losses, self.watch = 0, [], Stopwatch()

    def __call__(self, line: dict) -> None:
        seconds = self.watch.seconds()
        if line["round"] == 0:
            self.commands.ready()
        elif line["refused"]:
            raise RuntimeError(f"round {line['round']}: {line['refused']}")
        else:
            self.losses.append(line["train_loss"])
            self.left -= 1
            if self.left:
                return
            run = self.simulation.run
            self.commands.answer(seconds=seconds, loss=statistics.mean(self.losses), moved=moved(run.first_arrays(), run.newest().state.arrays))
        self.wait()

    def wait(self) -> None:
        while command := self.commands.next():
            if "products" in command:
                self.commands.answer(share=products_share(self.simulation))
                continue
            self.left, self.losses, self.watch = command["rounds"], [], Stopwatch()
            return
        raise Over


def products_share(simulation: Simulation) -> float | None:
    """Share of a step's time that its bare matrix products take, timed alone on the same shapes; None where the engine cannot say."""
    return None
