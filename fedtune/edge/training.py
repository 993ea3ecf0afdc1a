"""Local training and evaluation on opened graphs: what `fedtune.training.local`,
`private` and `evaluate` do, with numpy.

Batches go through the graph in pieces, whose gradients are added up, so that memory is that of a
piece and not of a batch.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedtune.adapters.ranks import at_rank
from fedtune.adapters.spec import AdapterSpec
from fedtune.data.clients import Stream
from fedtune.data.encoded import ClientData, Encoder
from fedtune.edge.graphs import Graphs, Passed
from fedtune.edge.optimizers import Optimizer
from fedtune.errors import Refused
from fedtune.job import FederationSection
from fedtune.privacy.clipping import clip
from fedtune.privacy.example import (
    ExamplePrivacy,
    SelfCheck,
    capped,
    drawn_noise,
    noisy_metrics,
    poisson_batches,
)
from fedtune.privacy.noise import Noise
from fedtune.round.batches import by_length, local_batches
from fedtune.stateful.base import Pull
from fedtune.types import Arrays, Metrics
from fedtune.wire import Pieces

TINY = 1e-12
"""Added to the length of a gradient that is divided by it."""


@dataclass(frozen=True)
class Engine:
    """Graphs with the encoder of their inputs. span: tokens (of an image: rows of pixels), padding
    counted, that go through at once.
    """

    graphs: Graphs
    encoder: Encoder
    span: int

    def added(
        self, values: Pieces, data: ClientData, weight: np.ndarray, names: Collection[str] | None = None
    ) -> Passed:
        """`Graphs.step` of any number of examples, piece by piece. weight: float32 [n]. names: whose
        gradients are wanted (None: all).
        """
        gradient, totals = np.zeros_like(values.vector), np.zeros(3)
        for rows in pieces(self.lengths(data), self.span):
            part = data.take(rows)
            # texts of one token, whose loss is empty, which no graph takes
            if not self.predictions(part).any():
                continue
            batch = self.encoder.collate(part.encoded)
            found = self.graphs.step(batch, part.labels, weight[rows], values, names)
            gradient += found.gradient
            totals += found.totals
        return Passed(gradient, totals)

    def passes(self, values: Arrays, data: ClientData) -> np.ndarray:
        """Summed loss, right predictions and predictions, float64 [3], with the inference graph alone."""
        totals = np.zeros(3)
        for rows in pieces(self.lengths(data), self.span):
            part = data.take(rows)
            batch = self.encoder.collate(part.encoded)
            totals += self.graphs.task.totals(self.graphs.logits(batch, values), batch, part.labels)
        return totals

    def lengths(self, data: ClientData | Stream) -> Sequence[int]:
        """In the unit of `span`."""
        return self.encoder.sides(data.lengths)

    def predictions(self, data: ClientData) -> np.ndarray:
        """Predictions that each example makes, int64 [n]."""
        return self.graphs.task.predictions(np.array(data.lengths, np.int64))


def pieces(lengths: Sequence[int], span: int) -> Iterator[np.ndarray]:
    """Places of examples in their order, as many at a time as fit `span` when padded to their
    longest, and at least one.
    """
    start, longest = 0, 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if place > start and (place + 1 - start) * longest > span:
            yield np.arange(start, place)
            start, longest = place, length
    if start < len(lengths):
        yield np.arange(start, len(lengths))


class TrainedPart:
    """The tensors that a round trains, as numbers of a vector of all:
    the optimizer moves these and no others.
    """

    def __init__(self, spec: AdapterSpec, names: Collection[str] | None, rank: int = 0) -> None:
        """names: None for all. rank: of the client, which trains the leading numbers of
        the cores alone (0: all).
        """
        of = at_rank(spec, rank)
        chosen = [names is None or t.name in names for t in of.trainable]
        self.spec = replace(of, trainable=tuple(t for t, taken in zip(of.trainable, chosen) if taken))
        self.sizes = [t.size for t in self.spec.trainable]
        self._mask = np.concatenate(
            [
                _leading(t.shape, own.shape, taken)
                for t, own, taken in zip(spec.trainable, of.trainable, chosen)
            ]
        )
        self._all = bool(self._mask.all())

    def of(self, vector: np.ndarray) -> np.ndarray:
        """[P] -> their numbers; the vector itself where they are all."""
        return vector if self._all else vector[self._mask]

    def step(self, optimizer: Optimizer, values: np.ndarray, gradient: np.ndarray) -> None:
        """Moves `values`, [P], in place by `gradient`, which is of these numbers."""
        moved = self.of(values)
        optimizer.step(moved, gradient)
        if not self._all:
            values[self._mask] = moved


def _leading(shape: tuple[int, ...], own: tuple[int, ...], taken: bool) -> np.ndarray:
    """Booleans for the numbers of a tensor: whether `taken`, and among its first `own` along each side."""
    found = np.zeros(shape, bool)
    found[tuple(slice(side) for side in own)] = taken
    return found.ravel()


def train_locally(
    engine: Engine,
    values: Pieces,
    data: ClientData | Stream,
    settings: FederationSection,
    round: int,
    rng: np.random.Generator,
    names: Collection[str] | None = None,
    pull: Pull | None = None,
    rank: int = 0,
) -> Metrics:
    """Runs the round's optimizer steps on these tensors of `values` (None: all), in place; see
    `training.local.train_locally`.

    A `pull` that names tensors is of all of them. rank: of the client,
    whose values are 0 beyond it (0: adapter.rank).
    """
    trained, pull = TrainedPart(engine.graphs.card.spec, names, rank), pull or Pull(settings.proximal)
    optimizer, totals = Optimizer(trained.spec, settings, round), np.zeros(3)
    mu, towards = (
        np.float32(pull.strength),
        trained.of(values.vector).copy() if pull.towards is None else _flat(pull.towards, values),
    )
    offset = np.float32(0) if pull.offset is None else _flat(pull.offset, values)
    still = np.flatnonzero(_flat(pull.moving, values) == 0) if pull.moving else np.zeros(0, np.int64)
    begin = values.vector[still].copy()
    for index in local_batches(
        data.lengths, settings.batch_size, settings.local_epochs, settings.local_steps, rng
    ):
        taken = data.take(index)
        count = int(engine.predictions(taken).sum())
        if count:  # a batch of one-token texts predicts nothing
            weight = np.full(len(taken), 1.0 / count, np.float32)
            gradient, found = engine.added(values, taken, weight, names)
            if pull.ascent:
                uphill = (
                    np.float32(pull.ascent / (float(np.linalg.norm(gradient.astype(np.float64))) + TINY))
                    * gradient
                )
                gradient, _ = engine.added(
                    Pieces(values.vector + uphill, values.layout), taken, weight, names
                )
            gradient = trained.of(gradient) + offset
            trained.step(
                optimizer,
                values.vector,
                gradient + mu * (trained.of(values.vector) - towards) if mu else gradient,
            )
            values.vector[still] = begin
            totals += found
    return _metrics(totals)


def _flat(arrays: Arrays, like: Pieces) -> np.ndarray:
    return np.concatenate([arrays[name].ravel() for name in like])


def batch_gradients(
    engine: Engine, values: Pieces, data: ClientData | Stream, batches: Iterable[np.ndarray]
) -> Iterator[Arrays]:
    """As `training.local.batch_gradients`, to all tensors."""
    for index in batches:
        taken = data.take(index)
        count = int(engine.predictions(taken).sum())
        if count:
            yield Pieces(
                engine.added(values, taken, np.full(len(taken), 1.0 / count, np.float32)).gradient,
                values.layout,
            )


def train_privately(
    engine: Engine,
    values: Pieces,
    data: ClientData | Stream,
    settings: FederationSection,
    privacy: ExamplePrivacy,
    round: int,
    noise: Noise,
    names: Collection[str] | None = None,
    rank: int = 0,
) -> Metrics:
    """DP-SGD on these tensors of `values` (None: all), in place, one example at a time; see
    `training.private.train_privately`.

    Gradients are clipped, and noise is added, over these numbers alone. rank: as in `train_locally`.
    Raises Refused as that does.
    """
    trained = TrainedPart(engine.graphs.card.spec, names, rank)
    optimizer, check = Optimizer(trained.spec, settings, round), SelfCheck(privacy)
    scores, start = np.zeros(3), trained.of(values.vector).copy()
    for index in poisson_batches(len(data), privacy, noise):
        total = np.zeros_like(start)
        for place in index:
            gradient, score = _of_one(engine, values, data.take(np.array([place])), names)
            total += clipped(trained.of(gradient), privacy.clip, check)
            scores += capped(score[None])[0]
        noisy = total + drawn_noise(trained.sizes, privacy, noise)
        check.noise(noisy - total)
        pull = np.float32(settings.proximal) * (trained.of(values.vector) - start)
        trained.step(optimizer, values.vector, noisy / np.float32(privacy.batch) + pull)
    check.require(start, trained.of(values.vector))
    return noisy_metrics(scores, privacy, noise)


def _of_one(engine: Engine, values: Pieces, one: ClientData, names: Collection[str] | None) -> Passed:
    """Gradient of one example's mean loss over its predictions, and its [loss, right, 1], means too."""
    made = max(int(engine.predictions(one)[0]), 1)
    gradient, totals = engine.added(values, one, np.full(1, 1.0 / made, np.float32), names)
    return Passed(gradient, np.array([totals[0] / made, totals[1] / made, 1.0]))


def clipped(gradient: np.ndarray, bound: float, check: SelfCheck) -> np.ndarray:
    """A gradient [P] cut to an L2 norm of at most `bound`; one that is not finite becomes 0."""
    try:
        cut = clip({"": gradient}, bound)[0][""]
    except Refused:
        cut = np.zeros_like(gradient)
    check.clipped(np.array([np.linalg.norm(cut.astype(np.float64))]))
    return cut


def score(engine: Engine, values: Arrays, data: ClientData | Stream, batch_size: int) -> Metrics:
    """Loss and accuracy over all examples, summed over predictions."""
    totals = np.zeros(3)
    for index in by_length(data.lengths, batch_size) if len(data) else ():
        totals += engine.passes(values, data.take(index))
    return _metrics(totals)


def _metrics(totals: np.ndarray) -> Metrics:
    loss, correct, count = totals.tolist()
    return {"loss": (loss, count), "accuracy": (correct, count)}
