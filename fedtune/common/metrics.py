"""Metrics as (sum, weight): merging is addition, division happens once at the end."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fedtune.types import Metrics

LARGEST_LOSS = 1e6
"""Cross-entropy of a prediction: about 10 at its worst in a sane model;
a diverging one may be far above that for a while.
"""


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


PERSONAL, PERSONAL_CLIENTS = "personal_", "personal_clients"
"""What names of metrics of clients' own models begin with; and beside such metrics,
(how many clients they are over, 1).
"""


def with_personal(metrics: Metrics, found: Sequence[Metrics]) -> Metrics:
    """The metrics of the global model with those of clients' own models:
    `found` has one for each client that has such a model.
    """
    return (
        metrics
        | {PERSONAL + name: value for name, value in merge(found).items()}
        | {PERSONAL_CLIENTS: (float(len(found)), 1.0)}
    )


def split_personal(metrics: Metrics) -> tuple[Metrics, Metrics]:
    """What a device says, as (metrics of the global model, those of its own)."""
    own = {name.removeprefix(PERSONAL): found for name, found in metrics.items() if name.startswith(PERSONAL)}
    return {name: found for name, found in metrics.items() if not name.startswith(PERSONAL)}, own


def plausible(metrics: Metrics, most: float) -> bool:
    """Whether metrics from outside can be what they say: loss and accuracy alone, over the same
    number of predictions, at most `most`, none of them more than right, no loss below 0 or above
    LARGEST_LOSS a prediction.
    """
    weights = {w for _, w in metrics.values()}
    loss, accuracy = (metrics.get(name, (0.0, 0.0))[0] for name in ("loss", "accuracy"))
    if (
        not metrics.keys() <= {"loss", "accuracy"}
        or len(weights) > 1
        or not all(0 <= w <= most for w in weights)
    ):
        return False
    count = max(weights, default=0.0)
    return 0 <= accuracy <= count * (1 + 1e-6) and 0 <= loss <= LARGEST_LOSS * count


def value(metrics: Metrics, name: str) -> float:
    """The mean `name` stands for; NaN where it is absent or nothing was counted."""
    s, w = metrics.get(name, (0.0, 0.0))
    return s / w if w > 0 else float("nan")


def tenth(count: int) -> int:
    """How many of `count` make the worst tenth: at least one."""
    return max(1, math.ceil(count / 10))


def worst_tenth(values: Iterable[float]) -> float:
    """Mean of the lowest 10 % (at least one value): how the worst-served clients fare.

    NaN when there are none.
    """
    ordered = np.sort(np.asarray(list(values), dtype=np.float64))
    if ordered.size == 0:
        return float("nan")
    return float(ordered[: tenth(ordered.size)].mean())
