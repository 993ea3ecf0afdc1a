"""Averages that some wrong updates cannot take where they want.

All updates of a round are in memory; no weights, as a client says its own.

A tensor counts the updates that hold it, and keeps the value of `reference` where none does. Over m
differences x_i from the reference:

    median         of each number
                   (Yin et al. 2018, arXiv:1803.01498, definition 1)
    trimmed mean   of each number, without its k largest and k smallest
                   (the same, definition 2)
    Krum           the update with the smallest sum of squared distances to its m - f - 2 nearest others
                   (Blanchard et al. 2017, arXiv:1703.02757, section 4)
    multi-Krum     the mean of the m - f updates with the smallest such sums
                   (the same, section 6)
    norm bound     the mean of x_i min(1, C / |x_i|)
                   (Sun et al. 2019, arXiv:1911.07963, section 4)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from fedtune.aggregation.mean import Mean, require_same
from fedtune.common.metrics import merge
from fedtune.common.trees import norm
from fedtune.errors import EmptyCohort
from fedtune.types import Arrays, Update

Combine = Callable[[np.ndarray], np.ndarray]
"""Differences [m, n] of one tensor -> their average [n]."""
Change = tuple[Update, Arrays]
"""An update, and the differences of its tensors from the reference, float64."""


def median(updates: Iterable[Update], reference: Arrays) -> Mean:
    """Raises EmptyCohort without updates, ShapeMismatch as `weighted_mean`; so do all below."""
    return _averaged(_changes(updates, reference), reference, lambda x: np.median(x, axis=0))


def trimmed_mean(updates: Iterable[Update], reference: Arrays, share: float) -> Mean:
    """share: of the updates, below 1/2, that is cut on each side, rounded down; at least one update where
    there are three or more.
    """
    return _averaged(_changes(updates, reference), reference, lambda x: _trimmed(x, share))


def krum(updates: Iterable[Update], reference: Arrays, wrong: int, several: bool = False) -> Mean:
    """wrong: f, how many updates may be wrong; fewer where the round has too few for it (m < 2
    f + 3). several: multi-Krum.

    A tensor that an update lacks counts as not moved.
    """
    changes = _changes(updates, reference)
    still = {name: np.zeros(a.shape) for name, a in reference.items()}
    vectors = np.stack(
        [
            np.concatenate([change.get(name, zeros).ravel() for name, zeros in still.items()])
            for _, change in changes
        ]
    )
    ranked = krum_order(vectors, wrong)
    kept = sorted(ranked[: max(1, len(changes) - tolerated(len(changes), wrong)) if several else 1])
    mean = _averaged([changes[i] for i in kept], reference, _mean)
    return replace(mean, aside=tuple(update.client for i, (update, _) in enumerate(changes) if i not in kept))


def norm_bound(updates: Iterable[Update], reference: Arrays, bound: float) -> Mean:
    """bound: C, on the L2 norm of an update's difference over all its tensors."""
    cut = []
    for update, change in _changes(updates, reference):
        size = norm(change)
        factor = min(1.0, bound / size) if size else 1.0
        cut.append((update, {name: factor * x for name, x in change.items()}))
    return _averaged(cut, reference, _mean)


def krum_order(vectors: np.ndarray, wrong: int) -> list[int]:
    """Places of the vectors [m, n], the one with the smallest sum of squared distances to
    its nearest others first.
    """
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


def _changes(updates: Iterable[Update], reference: Arrays) -> list[Change]:
    return [
        (update, {name: a.astype(np.float64) - reference[name] for name, a in update.arrays.items()})
        for update in require_updates(updates, reference)
    ]


def require_updates(updates: Iterable[Update], reference: Arrays) -> list[Update]:
    """All of them. Raises EmptyCohort without any, ShapeMismatch as `weighted_mean`."""
    found = list[Update]()
    for update in updates:
        require_same(update, reference)
        found.append(update)
    if not found:
        raise EmptyCohort("0 updates: nothing to average")
    return found


def _averaged(changes: Sequence[Change], reference: Arrays, combine: Combine) -> Mean:
    arrays = dict(reference)
    for name, old in reference.items():
        if parts := [change[name].ravel() for _, change in changes if name in change]:
            arrays[name] = (old + combine(np.stack(parts)).reshape(old.shape)).astype(old.dtype)
    updates = [update for update, _ in changes]
    return Mean(
        arrays, tuple(u.client for u in updates), float(len(updates)), merge([u.metrics for u in updates])
    )


def _mean(x: np.ndarray) -> np.ndarray:
    return x.mean(0)


def _trimmed(x: np.ndarray, share: float) -> np.ndarray:
    cut = int(share * len(x))
    if share and not cut and len(x) > 2:
        cut = 1
    return np.sort(x, axis=0)[cut : len(x) - cut].mean(0)
