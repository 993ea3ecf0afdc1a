"""Which blocks each client of a round trains, from scores of all blocks:
the objective of arXiv:2408.15600 (ISIT 2025, section 4).

    maximise   sum_i sum_l m_il s_il  -  consistency * sum_{i<j} sum_l (m_il - m_jl)^2
    with       1 <= sum_l m_il <= budget_i,   m_il = 0 for the blocks below the depth of client i,   m binary

The first sum wants every client to train what matters most for it, the second wants clients to train the
same. s_i are a client's scores divided by their sum, over the blocks within its depth, so that `consistency`
has no unit; the paper's code takes squared gradient norms as they are. The paper counts every block as the
same cost; the depth is there as a block needs the backward pass of all above it.

Solved by block-coordinate ascent: with all other clients fixed, the best choice of one is known
exactly, so each change raises the objective, and it ends. It ends in a local maximum, so the best of
several starts is taken.
"""

from collections.abc import Iterator

import numpy as np

_GAIN = 1e-12  # less is rounding, and a choice that rounding moves to and fro would never end


def choose(
    scores: np.ndarray, budgets: np.ndarray, consistency: float, depths: np.ndarray | None = None
) -> np.ndarray:
    """Blocks of each client: booleans [clients, blocks]. Of equal ones the upper is taken.

    Args:
        scores: at least 0, [clients, blocks].
        budgets: blocks that each client may train, at least 1, integers [clients]. It trains fewer where more
            would not raise the objective, and always one.
        depths: how many blocks, counted from the top, each client may choose among, at least 1, integers
            [clients]; None: all of them.
    """
    within = reach(scores.shape, depths)
    shares = normalised(scores, within)
    budgets = np.minimum(budgets, within.sum(1))
    found = [
        _ascend(start, shares, within, budgets, consistency) for start in _starts(shares, within, budgets)
    ]
    return max(found, key=lambda chosen: objective(chosen, shares, consistency))


def reach(shape: tuple[int, ...], depths: np.ndarray | None) -> np.ndarray:
    """Which blocks each client may choose: booleans [clients, blocks]."""
    clients, blocks = shape
    return (
        np.ones(shape, bool)
        if depths is None
        else np.arange(blocks) >= blocks - np.asarray(depths).reshape(clients, 1)
    )


def objective(chosen: np.ndarray, shares: np.ndarray, consistency: float) -> float:
    """What `choose` maximises, of one choice. chosen, shares: [clients, blocks]."""
    takers = chosen.sum(0)
    return float(shares[chosen].sum() - consistency * (takers * (len(chosen) - takers)).sum())


def normalised(scores: np.ndarray, within: np.ndarray | None = None) -> np.ndarray:
    """Each client's scores, of the blocks `within` its reach (None: of all), with sum 1 and 0 elsewhere;
    all equal for a client whose scores are all 0.
    """
    within = np.ones(scores.shape, bool) if within is None else within
    scores = np.where(within, scores, 0.0)
    totals = scores.sum(1, keepdims=True)
    return np.where(
        totals > 0, scores / np.where(totals > 0, totals, 1.0), within / within.sum(1, keepdims=True)
    )


def _starts(shares: np.ndarray, within: np.ndarray, budgets: np.ndarray) -> Iterator[np.ndarray]:
    """What each would take alone; what all together would, as many as each may, as many as all may, and
    one; and, where some reach less than others, these last two of what all reach.
    """
    common = np.broadcast_to(shares.mean(0), shares.shape)
    least, one, shared = (
        np.full_like(budgets, budgets.min()),
        np.ones_like(budgets),
        np.broadcast_to(within.all(0), within.shape),
    )
    starts = [
        (shares, budgets, within),
        (common, budgets, within),
        (common, least, within),
        (common, one, within),
    ]
    if not within.all():
        starts += [(common, np.minimum(least, shared.sum(1)), shared), (common, one, shared)]
    for values, most, open_ in starts:
        yield np.stack([_highest(row, count) for row, count in zip(np.where(open_, values, -np.inf), most)])


def _ascend(
    start: np.ndarray, shares: np.ndarray, within: np.ndarray, budgets: np.ndarray, consistency: float
) -> np.ndarray:
    chosen, others, moved = start.copy(), len(start) - 1, True
    while moved:
        moved = False
        for i, row in enumerate(shares):
            gain = np.where(
                within[i], row - consistency * (others - 2 * (chosen.sum(0) - chosen[i])), -np.inf
            )
            best = _highest(gain, budgets[i]) & (gain > 0)
            if not best.any():
                best = _highest(gain, 1)
            if gain[best].sum() > gain[chosen[i]].sum() + _GAIN:
                chosen[i], moved = best, True
    return chosen


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest, of equal ones the last: booleans [n]."""
    taken = np.zeros(len(values), bool)
    taken[len(values) - 1 - np.argsort(-values[::-1], kind="stable")[:count]] = True
    return taken
