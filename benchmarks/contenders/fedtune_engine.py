"""fedtune's own engines: a Simulation as `fedtune simulate` runs it, stopped after each round until
the driver wants the next.
"""

import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from contenders.serve import Commands, Stopwatch
from contenders.work import CASES, Order, drawn, moved, open_case
from fedtune.common.seeds import generator
from fedtune.job import job_from
from fedtune.round.batches import local_batches
from fedtune.round.watch import Watch
from fedtune.runs.folder import create_run
from fedtune.simulation import vectorised
from fedtune.training import cohort, worker
from fedtune.training.chunks import Task
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
    run = create_run(
        Path(order.folder), setup.job, {"created": "", "versions": {}, "sha256": setup.sha256, "split": []}
    )
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

    def together(
        self: cohort.CohortTrainer, start: np.ndarray, tasks: Sequence[object], *rest: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        return np.tile(start, (len(tasks), 1)), np.tile([0.0, 0.0, 1.0], (len(tasks), 1))

    worker.train_locally = nothing
    vectorised.training_batches = lambda *args: []
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
            self.commands.answer(
                seconds=seconds,
                loss=statistics.mean(self.losses),
                moved=moved(run.first_arrays(), run.newest().state.arrays),
            )
        self.wait()

    def wait(self) -> None:
        while command := self.commands.next():
            if "products" in command:
                self.commands.answer(share=products_share(self.simulation))
                continue
            self.left, self.losses, self.watch = command["rounds"], [], Stopwatch()
            return
        raise Over


PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


class Noted(TorchDispatchMode):
    """Notes every matrix product that runs inside: the operation, and shape and strides of what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Any, list[tuple[tuple[int, ...], tuple[int, ...]]], dict]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.products.append(
                (
                    func,
                    [(tuple(x.shape), x.stride()) for x in args],
                    {k: v for k, v in (kwargs or {}).items() if k != "out"},
                )
            )
        return func(*args, **(kwargs or {}))


def run_all(calls: list[tuple[Any, list[torch.Tensor], dict]]) -> None:
    """One after another; no result is kept."""
    for func, args, kwargs in calls:
        func(*args, **kwargs)


def products_share(simulation: Simulation, repeats: int = 5) -> float | None:
    """Share of a cohort's training that its bare matrix products take, timed alone on the same shapes,
    medians of alternating runs.
    """
    setup, trainer = simulation.setup, simulation._trainer()
    if trainer is None:
        return None
    fed, start = setup.job.federation, simulation.run.newest().state.arrays
    flat = np.concatenate([start[t.name].ravel() for t in setup.spec.trainable])
    tasks = []
    for name in drawn(setup, 1):
        data = setup.store.train(name)
        batches = list(
            local_batches(
                data.lengths,
                fed.batch_size,
                fed.local_epochs,
                fed.local_steps,
                generator(fed.seed, "local", 1, name),
            )
        )
        tasks.append(Task(name, data, batches))
    with Noted() as noted:
        trainer.train(flat, tasks, 1)
    made: dict[tuple, torch.Tensor] = {}

    def tensor(layout: tuple[tuple[int, ...], tuple[int, ...]]) -> torch.Tensor:
        if layout not in made:
            made[layout] = torch.empty_strided(*layout).normal_()
        return made[layout]

    calls = [
        (func, [tensor(layout) for layout in layouts], kwargs) for func, layouts, kwargs in noted.products
    ]
    whole, bare = [], []
    for _ in range(repeats):
        for times, work in ((whole, lambda: trainer.train(flat, tasks, 1)), (bare, lambda: run_all(calls))):
            began = time.perf_counter()
            with torch.no_grad() if times is bare else contextlib.nullcontext():
                work()
            times.append(time.perf_counter() - began)
            for x in made.values():  # adding in place again and again would overflow
                x.clamp_(-3, 3)
    return statistics.median(bare) / statistics.median(whole)
