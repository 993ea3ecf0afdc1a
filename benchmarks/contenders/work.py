"""The work of benchmarks/simulation.py: the cases, and what a contender needs to do them.

fedtune takes a case as a `Setup`. The peers take the same examples, cohorts, start and layers from here as
plain torch objects, and bring their own loop, batches, transport and averaging.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedtune.adapters import methods
from fedtune.adapters.describe import describe
from fedtune.adapters.spec import AdapterSpec
from fedtune.algorithms.fed_avg import draw_cohort
from fedtune.common.seeds import generator
from fedtune.data.encoded import ClientData
from fedtune.data.examples import Dataset, Examples
from fedtune.data.partition import Split
from fedtune.data.slices import Names, Slices
from fedtune.job import Job, parse_job
from fedtune.models.base import TunableModel, layout
from fedtune.models.sources import Source
from fedtune.tasks import TASKS
from fedtune.types import Arrays
from fedtune.workflows.setup import Setup, data_free_frame, open_setup

STEPS, BATCH = 4, 8
ENDLESS = 100_000  # rounds; the driver ends a run by ending its process


class Order(NamedTuple):
    """What the driver tells a contender: the case, clients a round, torch threads (of those that work
    in one process), a folder.
    """

    case: str
    cohort: int
    threads: int
    folder: str


@dataclass(frozen=True)
class Case:
    """One kind of work.

    Attributes:
        settings: overrides of the default job.
        top: train only so many blocks from the top (0: all).
        idle: clients return what they received.
    """

    about: str
    settings: tuple[str, ...]
    top: int = 0
    idle: bool = False

    def job(self, cohort: int) -> Job:
        """Its only evaluations are of the start, on few examples, and after ENDLESS rounds."""
        common = (
            f"federation.cohort={cohort}",
            f"federation.local-steps={STEPS}",
            f"federation.batch-size={BATCH}",
            f"federation.rounds={ENDLESS}",
            f"evaluation.every={ENDLESS}",
            "evaluation.max-examples=16",
        )
        return parse_job("", (*common, *self.settings))


IID = ('data.partition="iid"', 'data.group=""', "data.clients=200")
CASES = {
    "a": Case("MiniLM, rank-16 cores on all linears", ()),
    "b": Case("MiniLM, cores of the top two blocks", (), top=2),
    "c": Case(
        "MLP on digits, all parameters",
        (
            *IID,
            'model.task="image-classification"',
            'adapter.method="full"',
            f"federation.local-epochs={STEPS}",
        ),
    ),
    "d": Case("clients that do nothing, tensors of (a)", IID, idle=True),
}


def open_case(name: str, cohort: int = 1) -> Setup:
    """The case as fedtune takes it, with so many clients a round."""
    case = CASES[name]
    job = case.job(cohort)
    if name == "c":
        return digits(job)
    setup = open_setup(job)
    return (
        TopBlocks(*(getattr(setup, field) for field in Setup.__dataclass_fields__), top=case.top)
        if case.top
        else setup
    )


@dataclass(frozen=True)
class TopBlocks(Setup):
    """Trains the cores of the `top` last blocks, and the head."""

    top: int = 1

    @cached_property
    def spec(self) -> AdapterSpec:
        whole = describe(layout(self.fresh_model()), self.job.adapter)
        blocks = [unit for unit in whole.schema.units if unit != "head"]
        chosen = {*blocks[-self.top :], "head"}
        linears, trainable, frame = (
            tuple(x for x in part if x.unit in chosen)
            for part in (whole.linears, whole.trainable, whole.frame)
        )
        return replace(whole, linears=linears, trainable=trainable, frame=frame)


class DigitsEncoder:
    """Rows of 64 pixels are inputs as they are."""

    def encode(self, images: tuple[np.ndarray, ...]) -> list[dict[str, np.ndarray]]:
        return [{"pixels": image} for image in images]

    def lengths(self, images: list[np.ndarray]) -> list[int]:
        return [64] * len(images)

    def collate(self, encoded: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {"pixels": np.stack([one["pixels"] for one in encoded])}


@dataclass(frozen=True)
class DigitsSetup(Setup):
    """A perceptron with one hidden layer, a base that fedtune's loaders do not know."""

    @cached_property
    def encoder(self) -> DigitsEncoder:  # type: ignore[override]
        return DigitsEncoder()

    @cached_property
    def spec(self) -> AdapterSpec:
        return describe(layout(self.fresh_model()), self.job.adapter)

    def fresh_model(self) -> TunableModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.job.federation.seed)
            body, head = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, self.classes)
        return TunableModel(body, TASKS[self.job.model.task], head).eval().requires_grad_(False)


def digits(job: Job) -> DigitsSetup:
    """Each client holds one batch, so that local epochs are steps; what is left over is held out."""
    found = load_digits()
    images = (found.data / 16).astype(np.float32)
    examples = Examples(tuple(images), found.target.astype(np.int64), tuple(map(str, range(len(images)))))
    names = tuple(f"client-{i:03d}" for i in range(job.data.clients))
    order = generator(job.federation.seed, "digits").permutation(len(images))
    cut = BATCH * len(names)
    parts = Split(
        Names(names),
        Slices.of(np.sort(order[:cut].reshape(len(names), BATCH))),
        Slices.of(np.array_split(order[cut:], len(names))),
    )
    labels = tuple(map(str, found.target_names))
    return DigitsSetup(
        job, Source("digits", None, ()), "", labels, Dataset(examples, labels, "digits"), parts
    )  # type: ignore[arg-type]


def drawn(setup: Setup, round: int) -> list[str]:
    """Who trains in a round: fedtune's draw, for everybody."""
    fed = setup.job.federation
    return [
        c.name
        for c in draw_cohort(setup.store.clients, fed.cohort, "fixed", generator(fed.seed, "cohort", round))
    ]


class Plain:
    """A case as a plain torch program has it: one model, what of it is trained,
    and everybody's tokenised examples.
    """

    def __init__(self, name: str, cohort: int = 1) -> None:
        self.setup = open_case(name, cohort)
        self.fed = self.setup.job.federation
        self.model = self.setup.fresh_model()
        frame = data_free_frame(self.setup, self.model)
        self.start: Arrays = methods.initial(self.model, self.setup.spec, {}, self.fed.seed)
        self.trained: dict[str, Tensor] = methods.attach(self.model, self.setup.spec, frame)
        methods.write(self.trained, self.start)
        self.data = (
            {}
            if CASES[name].idle
            else {client: self.setup.store.train(client) for client in self.setup.split.clients}
        )

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.trained.values(), lr=self.fed.lr, weight_decay=0.0)

    def collate(self, data: ClientData, index: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        arrays = self.setup.encoder.collate([data.encoded[i] for i in index])
        return {k: torch.from_numpy(v) for k, v in arrays.items()}, torch.from_numpy(data.labels[index])

    def loss(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(**inputs), labels)


def shuffled(count: int) -> Iterator[np.ndarray]:
    """One epoch of batches in random order, as a plain program draws them."""
    order = np.random.permutation(count)
    for begin in range(0, count, BATCH):
        yield order[begin : begin + BATCH]


def moved(start: Arrays, arrays: Arrays) -> float:
    """How far a model is from its start, L2."""
    return float(np.sqrt(sum(np.square(arrays[n].astype(np.float64) - a).sum() for n, a in start.items())))
