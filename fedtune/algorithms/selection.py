"""Which blocks each client of a round trains, from scores of all blocks: the objective of arXiv:2408.15600 (ISIT 2025, section 4).

    maximise   sum_i sum_l m_il s_il  -  consistency * sum_{i<j} sum_l (m_il - m_jl)^2,   with sum_l m_il <= budget_i,  m binary

The first sum wants every client to train what matters most for it, the second wants clients to train the same. s_i are a client's
scores divided by their sum, so that `consistency` has no unit; the paper's code takes squared gradient norms as they are.

Solved by block-coordinate ascent: with all other clients fixed, the best choice of one is known exactly, so each change raises the
objective, and it ends. It ends in a local maximum, so the best of four starts is taken.
"""

from collections.abc import Iterator

import numpy as np

_GAIN = 1e-12  # less is rounding, and a choice that rounding moves to and fro would never end


def choose(scores: np.ndarray, budgets: np.ndarray, consistency: float) -> np.ndarray:
    """Blocks of each client: booleans [clients, blocks]. Of equal ones the upper is taken.

    Args:
        scores: at least 0, [clients, blocks].
        budgets: blocks that each client may train, integers [clients]. With consistency a client may train fewer.
    """
    shares = normalised(scores)
    found = [_ascend(start, shares, budgets, consistency) for start in _starts(shares, budgets)]
    return max(found, key=lambda chosen: objective(chosen, shares, consistency))


def objective(chosen: np.ndarray, shares: np.ndarray, consistency: float) -> float:
    """What `choose` maximises, of one choice. chosen, shares: [clients, blocks]."""
    takers = chosen.sum(0)
    return float(shares[chosen].sum() - consistency * (takers * (len(chosen) - takers)).sum())


def normalised(scores: np.ndarray) -> np.ndarray:
    """Each client's scores with sum 1; all equal for a client whose scores are all 0."""
    totals = scores.sum(1, keepdims=True)
    return np.where(totals > 0, scores / np.where(totals > 0, totals, 1.0), 1.0 / scores.shape[1])


def _starts(shares: np.ndarray, budgets: np.ndarray) -> Iterator[np.ndarray]:
    """Nothing; what each would take alone; what all together would, as many as each may; and as many as all may."""
    common = np.broadcast_to(shares.mean(0), shares.shape)
    yield np.zeros(shares.shape, bool)
    for values, most in ((shares, budgets), (common, budgets), (common, np.full_like(budgets, budgets.min(initial=shares.shape[1])))):
        yield np.stack([_largest(row, count) for row, count in zip(values, most)])


def _ascend(start: np.ndarray, shares: np.ndarray, budgets: np.ndarray, consistency: float) -> np.ndarray:
    chosen, others, moved = start.copy(), len(start) - 1, True
    while moved:
        moved = False
        for i, row in enumerate(shares):
            gain = row - consistency * (others - 2 * (chosen.sum(0) - chosen[i]))
            best = _largest(gain, budgets[i]) & (gain > 0)
            if gain[best].sum() > gain[chosen[i]].sum() + _GAIN:
                chosen[i], moved = best, True
    return chosen


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest, of equal ones the last: booleans [n]."""
    taken = np.zeros(len(values), bool)
    taken[len(values) - 1 - np.argsort(-values[::-1], kind="stable")[:count]] = True
    return taken
