"""Metrics as (sum, weight): merging is addition, division happens once at the end."""

import math
from collections.abc import Iterable

import numpy as np

from fedtune.types import Metrics


def merge(parts: Iterable[Metrics]) -> Metrics:
    """Sum of sums over sum of weights, name by name.

    >>> merge([{"loss": (2.0, 4.0)}, {"loss": (1.0, 1.0)}])
    {'loss': (3.0, 5.0)}
    """
    total: Metrics = {}
    for part in parts:
        for name, (s, w) in part.items():
            s0, w0 = total.get(name, (0.0, 0.0))
            total[name] = (s0 + s, w0 + w)
    return total


def value(metrics: Metrics, name: str) -> float:
    """The mean `name` stands for; NaN where it is absent or nothing was counted."""
    s, w = metrics.get(name, (0.0, 0.0))
    return s / w if w > 0 else float("nan")


def tenth(count: int) -> int:
    """How many of `count` make the worst tenth: at least one."""
    return max(1, math.ceil(count / 10))


def worst_tenth(values: Iterable[float]) -> float:
    """Mean of the lowest 10 % (at least one value): how the worst-served clients fare. NaN when there are none."""
    ordered = np.sort(np.asarray(list(values), dtype=np.float64))
    if ordered.size == 0:
        return float("nan")
    return float(ordered[: tenth(ordered.size)].mean())
