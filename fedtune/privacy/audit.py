"""What guesses prove: a lower bound of epsilon from one run (Steinke, Nasr and Jagielski 2023, "Privacy
Auditing with One (1) Training Run", arXiv:2305.08846, Algorithm 1, Theorem 5.2, and the p-value of appendix
D). Numbers only: no run, no torch.

Each of m canaries is in the run or not, by a fair coin that the run does not see. Of what the run releases an
attacker makes r guesses, "in" or "out", and abstains from the rest. If the run is (epsilon, delta)-private
with respect to each canary, then with q = e^epsilon / (e^epsilon + 1)

    P[at least v of the r guesses are right] <= f(v) + 2 m delta max over i = 1..v of (f(v - i) - f(v)) / i,
    f(v) = P[Binomial(r, q) >= v],

whatever the attacker does and however the canaries disturb each other. So guesses that are too good refute a
claimed epsilon, while a bound below the claim proves nothing: one run shows less than the truth, the less so
the smaller delta and the larger epsilon.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
LARGEST = 50.0
"""Epsilon above which none is looked for."""
FEWEST = 6
"""Guesses below which a plan has no use: five right ones out of five happen by chance more often
than once in twenty times.
"""


@dataclass(frozen=True)
class Outcome:
    """What an audit found.

    Attributes:
        canaries: m. guesses: r, fixed before the run. correct: v of them.
        made: those the attacker had anything to go by for; the other r - made are counted as wrong.
        delta: of the promise.
    """

    canaries: int
    guesses: int
    made: int
    correct: int
    delta: float

    @cached_property
    def lower(self) -> float:
        """Epsilon is at least this, with CONFIDENCE."""
        return lower_bound(self.canaries, self.guesses, self.correct, self.delta)

    @cached_property
    def ceiling(self) -> float:
        """`lower` if every guess had been right: no more can be shown this way."""
        return lower_bound(self.canaries, self.guesses, self.guesses, self.delta)


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """The most that P[at least v of r guesses are right] can be under (epsilon, delta), at most 1.

    See the top of this file.

    Raises ValueError unless 0 <= v <= r <= m, epsilon >= 0 and 0 <= delta <= 1.
    """
    if not (0 <= v <= r <= m and epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(
            f"m = {m}, r = {r}, v = {v}, epsilon = {epsilon}, delta = {delta}: must be 0 <= v <= r <= m, "
            "epsilon >= 0, 0 <= delta <= 1"
        )
    q = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(stats.binom.sf(v - 1, r, q))
    # below it f is 1 to all digits: a larger i only divides by more
    last = max(0, math.floor(r * q - 12 * math.sqrt(r * q * (1 - q))) - 1)
    if delta == 0 or last >= v:
        return min(tail, 1.0)
    # f(v - i) - f(v), i = 1..v - last
    gained = np.cumsum(stats.binom.pmf(np.arange(v - 1, last - 1, -1), r, q))
    return min(tail + 2 * m * delta * float((gained / np.arange(1, v - last + 1)).max()), 1.0)


def lower_bound(m: int, r: int, v: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest epsilon that v right guesses out of r refute: 0 where they refute none.

    The p-value is of (epsilon, delta), and whoever keeps that keeps every larger epsilon as well: so with
    probability `confidence` no true epsilon lies below what is returned.
    """

    def kept(epsilon: float) -> float:
        return p_value(m, r, v, epsilon, delta) - (1 - confidence)

    if kept(0.0) >= 0:
        return 0.0
    return LARGEST if kept(LARGEST) < 0 else float(optimize.brentq(kept, 0.0, LARGEST, xtol=1e-6))


def accuracy(evidence: np.ndarray, coins: np.ndarray) -> np.ndarray:
    """float64 [n]: the share of right ones among the 1, 2, ... n guesses with the strongest evidence;
    evidence as in `take_guesses`.
    """
    order = np.argsort(-np.abs(evidence), kind="stable")
    return np.cumsum((evidence[order] != 0) & ((evidence[order] > 0) == coins[order])) / np.arange(
        1, len(order) + 1
    )


def expected_bound(rehearsed: np.ndarray, m: int, r: int, delta: float) -> float:
    """`lower_bound` to expect of r guesses of m canaries, from the `accuracy` of a rehearsal
    with others of their kind.
    """
    place = max(1, round(r / m * len(rehearsed)))
    return lower_bound(m, r, math.floor(r * float(rehearsed[place - 1])), delta)


def planned_guesses(rehearsed: np.ndarray, m: int, delta: float) -> int:
    """How many guesses to make of m canaries: so many that the bound is expected to be largest, the fewest of
    those. Even, if it can be, so that as many may be "in" as "out". Depends on a rehearsal (see
    `expected_bound`), never on the run: looking first would prove nothing.
    """
    choices = sorted({2 * half for half in _ladder(m // 2) if half >= FEWEST // 2})
    return max(choices, key=lambda r: expected_bound(rehearsed, m, r, delta), default=m)


def planned_canaries(rehearsed: np.ndarray, most: int, delta: float) -> int:
    """How many canaries to use if there may be `most`, in the same sense: where m delta is not small,
    more of them show less.
    """
    choices = sorted(
        {most, *(10**n // part for n in range(2, 10) for part in (1, 3) if 10**n // part < most)}
    )

    def worth(m: int) -> tuple[float, float]:
        r = planned_guesses(rehearsed, m, delta)
        return round(expected_bound(rehearsed, m, r, delta), 2), round(lower_bound(m, r, r, delta), 2)

    return max(choices, key=worth)


def _ladder(most: int) -> list[int]:
    """Numbers from 1 to `most`, each about 1.4 times the one before; empty for 0."""
    return sorted({min(most, round(2.0 ** (step / 2))) for step in range(2 * most.bit_length() + 1)} - {0})


def best_ceiling(m: int, delta: float) -> float:
    """The most that m canaries can show at all: every guess right, of the best number of guesses."""
    return max(lower_bound(m, r, r, delta) for r in _ladder(m))


def take_guesses(evidence: np.ndarray, count: int) -> np.ndarray:
    """int8 [m]: 1 "in", -1 "out", 0 abstained; `count` guesses where evidence is strongest,
    fewer where there is not so much.

    Args:
        evidence: float [m], the logarithm of how much likelier what was seen is with the canary in than
            out; 0: nothing was seen.
    """
    out = np.zeros(len(evidence), np.int8)
    chosen = np.argsort(-np.abs(evidence), kind="stable")[:count]
    out[chosen] = np.sign(evidence[chosen])
    return out


def count_right(guesses: np.ndarray, coins: np.ndarray) -> int:
    """How many of int8 [m] guesses name the side on which bool [m] coins fell."""
    return int(((guesses != 0) & ((guesses > 0) == coins)).sum())
