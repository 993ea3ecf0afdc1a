"""The weighted mean, tensor by tensor over those who trained it, streaming."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedtune.errors import EmptyCohort, ShapeMismatch
from fedtune.metrics import merge
from fedtune.types import Arrays, Metrics, Update


@dataclass(frozen=True)
class Mean:
    """A mean with what went into it."""

    arrays: Arrays
    clients: tuple[str, ...]
    weight: float
    metrics: Metrics


def weighted_mean(updates: Iterable[Update], reference: Arrays, *, equal: bool = False) -> Mean:
    """Mean of updates, each tensor over the updates that hold it: sum(w * u) / sum(w).

    A tensor that no update holds keeps the value of `reference`. Reads `updates` once and keeps one running sum, so memory
    is that of two models whatever the cohort. Sums in float64 in the order given; two orders may differ in the last bits
    before rounding to float32. Inputs are not changed.

    Because the frame (A, B) is common and frozen, averaging cores this way is exact: sum p_i (B R_i A) = B (sum p_i R_i) A.

    Args:
        updates: their tensors are among those of `reference`, of the same shapes; weights are finite and at least 0.
        reference: the model the round started from.
        equal: count every update once, whatever its weight.

    Raises:
        EmptyCohort: no updates, or weights that sum to 0.
        ShapeMismatch: names the client, the tensor and both shapes.

    Source: McMahan et al. 2017, arXiv:1602.05629v4, Algorithm 1; per tensor as in arXiv:2408.15600, section 3.
    """
    sums: Arrays = {}
    weights: dict[str, float] = {}
    clients: list[str] = []
    total = 0.0
    metrics: Metrics = {}
    for update in updates:
        weight = 1.0 if equal else update.weight
        for name, array in update.arrays.items():
            _check(update.client, name, array, reference)
            sums[name] = weight * array.astype(np.float64) if name not in sums else _add(sums[name], weight, array)
            weights[name] = weights.get(name, 0.0) + weight
        clients.append(update.client)
        total += weight
        metrics = merge([metrics, update.metrics])
    if total <= 0:
        raise EmptyCohort(f"{len(clients)} updates with total weight {total}: nothing to average")
    arrays = {
        name: (sums[name] / weights[name]).astype(array.dtype) if weights.get(name, 0.0) > 0 else array
        for name, array in reference.items()
    }
    return Mean(arrays, tuple(clients), total, metrics)


def _add(running: np.ndarray, weight: float, array: np.ndarray) -> np.ndarray:
    running += weight * array.astype(np.float64)
    return running


def _check(client: str, name: str, array: np.ndarray, reference: Arrays) -> None:
    if name not in reference:
        raise ShapeMismatch(f"client {client!r}: tensor {name!r} is not part of the model")
    if array.shape != reference[name].shape:
        raise ShapeMismatch(f"client {client!r}, tensor {name!r}: shape {array.shape}, the model has {reference[name].shape}")
