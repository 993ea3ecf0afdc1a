"""The weighted mean, tensor by tensor over those who trained it, streaming."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedtune.common.metrics import merge
from fedtune.errors import EmptyCohort, ShapeMismatch
from fedtune.types import Arrays, Metrics, Update
from fedtune.wire import Pieces, layout

WAITING, WAITING_BYTES, STRETCH = 8, 2**25, 2**13
"""Updates that lie in one vector wait until there are so many, or so many bytes, and go into the running sum
together, in stretches of so many numbers: eight float64 copies of a stretch fit a core's cache, and the sum
is read and written once instead of eight times.
"""


@dataclass(frozen=True)
class Mean:
    """A mean with what went into it. `aside`: clients whose updates came and were left out."""

    arrays: Arrays
    clients: tuple[str, ...]
    weight: float
    metrics: Metrics
    aside: tuple[str, ...] = ()


def weighted_mean(updates: Iterable[Update], reference: Arrays, *, equal: bool = False) -> Mean:
    """Mean of updates, each tensor over the updates that hold it: sum(w * u) / sum(w).

    A tensor that no update holds keeps the value of `reference`. Reads `updates` once and keeps one running
    sum, so memory is that of two models and at most WAITING_BYTES, or one update, whatever the cohort. Sums
    in float64; two orders may differ in the last bits before rounding to float32. Inputs are not changed.

    Because the frame (A, B) is common and frozen, averaging cores this way is exact:
    sum p_i (B R_i A) = B (sum p_i R_i) A.

    Args:
        updates: their tensors are among those of `reference`, of the same shapes;
            weights are finite and at least 0.
        reference: the model the round started from.
        equal: count every update once, whatever its weight.

    Raises:
        EmptyCohort: no updates, or weights that sum to 0.
        ShapeMismatch: names the client, the tensor and both shapes.

    Source: McMahan et al. 2017, arXiv:1602.05629v4, Algorithm 1;
    per tensor as in arXiv:2408.15600, section 3.
    """
    return streamed(updates, lambda first: _Running(reference, first.arrays), equal)


class Sums(Protocol):
    """What a mean needs of the updates so far."""

    def add(self, weight: float, update: Update) -> None:
        """Raises ShapeMismatch for an update that is not of the model."""

    def means(self) -> Arrays:
        """Of the updates that were added; a number that none of any weight holds is that of the model."""


def streamed(updates: Iterable[Update], begin: Callable[[Update], Sums], equal: bool) -> Mean:
    """The mean that the sums give which begin(first update) makes; `updates` are read once. equal and
    EmptyCohort: as `weighted_mean`.
    """
    sums: Sums | None = None
    clients: list[str] = []
    total = 0.0
    metrics: Metrics = {}
    for update in updates:
        weight = 1.0 if equal else update.weight
        sums = sums or begin(update)
        sums.add(weight, update)
        clients.append(update.client)
        total += weight
        metrics = merge([metrics, update.metrics])
    if sums is None or total <= 0:
        raise EmptyCohort(f"{len(clients)} updates with total weight {total}: nothing to average")
    return Mean(sums.means(), tuple(clients), total, metrics)


class _Running:
    """sum(w * u) and sum(w), tensor by tensor."""

    def __init__(self, reference: Arrays, first: Arrays) -> None:
        """`first`: an update; the sum lies in memory in its order, because most come in the same."""
        order = [name for name in dict.fromkeys([*first, *reference]) if name in reference]
        self.reference = reference
        self.sums = Pieces(
            np.zeros(sum(a.size for a in reference.values())),
            layout((name, reference[name].shape) for name in order),
        )
        self.weights = dict.fromkeys(reference, 0.0)
        self.whole = 0.0  # weight of the updates that held everything
        self.waiting: list[tuple[float, np.ndarray]] = []

    def add(self, weight: float, update: Update) -> None:
        """Adds one update: as one vector where it is one, else tensor by tensor."""
        arrays = update.arrays
        # names and shapes are those of the model, too
        if isinstance(arrays, Pieces) and arrays.layout == self.sums.layout:
            self.whole += weight
            self.waiting.append((weight, arrays.vector))
            if len(self.waiting) == WAITING or (len(self.waiting) + 1) * arrays.vector.nbytes > WAITING_BYTES:
                self._add_waiting()
            return
        require_same(update, self.reference)
        for name, array in arrays.items():
            self.sums[name] += weight * array.astype(np.float64)
            self.weights[name] += weight

    def means(self) -> Arrays:
        """The means in the dtype of the reference; a tensor that no update of any weight holds
        is that of the reference.
        """
        self._add_waiting()
        weights = {name: self.whole + weight for name, weight in self.weights.items()}
        return {
            name: (self.sums[name] / weights[name]).astype(array.dtype) if weights[name] > 0 else array
            for name, array in self.reference.items()
        }

    def _add_waiting(self) -> None:
        weights, vectors = np.array([w for w, _ in self.waiting]), [v for _, v in self.waiting]
        self.waiting = []
        doubles = np.empty((len(vectors), STRETCH))
        for start in range(0, self.sums.vector.size if vectors else 0, STRETCH):
            part = self.sums.vector[start : start + STRETCH]
            rows = doubles[:, : part.size]
            for row, vector in zip(rows, vectors):
                row[:] = vector[start : start + STRETCH]
            part += weights @ rows


def require_same(update: Update, reference: Arrays) -> None:
    """Raises ShapeMismatch for a tensor that is not one of `reference`, or is of another shape there."""
    for name, array in update.arrays.items():
        if name not in reference:
            raise ShapeMismatch(f"client {update.client!r}: tensor {name!r} is not part of the model")
        if array.shape != reference[name].shape:
            raise ShapeMismatch(
                f"client {update.client!r}, tensor {name!r}: shape {array.shape}, "
                f"the model has {reference[name].shape}"
            )
