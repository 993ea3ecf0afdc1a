"""Averages that some wrong updates cannot take where they want. All updates of a round are in memory; no weights, as a client says its own.

A tensor counts the updates that hold it, and keeps the value of `reference` where none does. Over m differences x_i from the reference:

    median         of each number                                            (Yin et al. 2018, arXiv:1803.01498, definition 1)
    trimmed mean   of each number, without its k largest and k smallest      (the same, definition 2)
    Krum           the update with the smallest sum of squared distances to its m - f - 2 nearest others
                                                                             (Blanchard et al. 2017, arXiv:1703.02757, section 4)
    multi-Krum     the mean of the m - f updates with the smallest such sums (the same, section 6)
    norm bound     the mean of x_i min(1, C / |x_i|)                         (Sun et al. 2019, arXiv:1911.07963, section 4)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from fedtune.aggregation.mean import Mean
from fedtune.errors import EmptyCohort, ShapeMismatch
from fedtune.metrics import merge
from fedtune.types import Arrays, Update

Rule = Callable[[np.ndarray], np.ndarray]
"""Differences [m, n] of one tensor -> their average [n]."""


def median(updates: Iterable[Update], reference: Arrays) -> Mean:
    """Raises EmptyCohort without updates, ShapeMismatch as `weighted_mean`; so do all below."""
    return _by_tensor(list(updates), reference, lambda x: np.median(x, axis=0))


def trimmed_mean(updates: Iterable[Update], reference: Arrays, share: float) -> Mean:
    """share: of the updates, below 1/2, that is cut on each side, rounded down; at least one update where there are three or more."""
    return _by_tensor(list(updates), reference, lambda x: _trimmed(x, share))


def krum(updates: Iterable[Update], reference: Arrays, wrong: int, several: bool = False) -> Mean:
    """wrong: f, how many updates may be wrong; fewer where the round has too few for it (m < 2 f + 3). several: multi-Krum.

    A tensor that an update lacks counts as not moved.
    """
    found = _checked(list(updates), reference)
    vectors = np.stack([np.concatenate([_difference(u, n, a).ravel() for n, a in reference.items()]) for u in found])
    ranked = krum_order(vectors, wrong)
    kept = [found[i] for i in sorted(ranked[: max(1, len(found) - tolerated(len(found), wrong)) if several else 1])]
    mean = _by_tensor(kept, reference, lambda x: x.mean(0))
    return replace(mean, aside=tuple(u.client for u in found if u.client not in mean.clients))


def norm_bound(updates: Iterable[Update], reference: Arrays, bound: float) -> Mean:
    """bound: C, on the L2 norm of an update's difference over all its tensors."""
    found = _checked(list(updates), reference)
    sizes = [np.sqrt(sum(float(np.square(_difference(u, n, reference[n])).sum()) for n in u.arrays)) for u in found]
    scales = [min(1.0, bound / size) if size else 1.0 for size in sizes]
    return _by_tensor(found, reference, lambda x: x.mean(0), scales)


def krum_order(vectors: np.ndarray, wrong: int) -> list[int]:
    """Places of the vectors [m, n], the one with the smallest sum of squared distances to its nearest others first."""
    m = len(vectors)
    squares = np.square(vectors).sum(1)
    apart = np.maximum(squares[:, None] + squares[None, :] - 2 * vectors @ vectors.T, 0.0)
    np.fill_diagonal(apart, 0.0)
    near = max(1, m - tolerated(m, wrong) - 2)
    scores = np.sort(apart, axis=1)[:, 1 : near + 1].sum(1)
    return np.argsort(scores, kind="stable").tolist()


def tolerated(m: int, wrong: int) -> int:
    """How many of m updates may be wrong: `wrong`, or as many as Krum can bear (2 f + 2 < m)."""
    return max(0, min(wrong, (m - 3) // 2))


def _by_tensor(updates: Sequence[Update], reference: Arrays, rule: Rule, scales: Sequence[float] = ()) -> Mean:
    found, arrays = _checked(updates, reference), dict[str, np.ndarray]()
    factors = scales or [1.0] * len(found)
    for name, old in reference.items():
        parts = [factor * _difference(u, name, old) for u, factor in zip(found, factors) if name in u.arrays]
        moved = rule(np.stack([x.ravel() for x in parts])).reshape(old.shape) if parts else np.zeros(old.shape)
        arrays[name] = (old + moved).astype(old.dtype)
    return Mean(arrays, tuple(u.client for u in found), float(len(found)), merge([u.metrics for u in found]))


def _difference(update: Update, name: str, old: np.ndarray) -> np.ndarray:
    return update.arrays[name].astype(np.float64) - old if name in update.arrays else np.zeros(old.shape)


def _trimmed(x: np.ndarray, share: float) -> np.ndarray:
    cut = int(share * len(x))
    if share and not cut and len(x) > 2:
        cut = 1
    return np.sort(x, axis=0)[cut : len(x) - cut].mean(0)


def _checked(updates: Sequence[Update], reference: Arrays) -> Sequence[Update]:
    if not updates:
        raise EmptyCohort("0 updates: nothing to average")
    for update in updates:
        for name, array in update.arrays.items():
            if name not in reference or array.shape != reference[name].shape:
                shape = reference[name].shape if name in reference else "no such tensor"
                raise ShapeMismatch(f"client {update.client!r}, tensor {name!r}: shape {array.shape}, the model has {shape}")
    return updates
