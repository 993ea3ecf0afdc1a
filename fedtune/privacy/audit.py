"""What guesses prove: a lower bound of epsilon from one run (Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training
Run", arXiv:2305.08846, Algorithm 1, Theorem 5.2, and the p-value of appendix D). Numbers only: no run, no torch.

Each of m canaries is in the run or not, by a fair coin that the run does not see. Of what the run releases an attacker makes r guesses,
"in" or "out", and abstains from the rest. If the run is (epsilon, delta)-private with respect to each canary, then with q = e^epsilon / (e^epsilon + 1)

    P[at least v of the r guesses are right] <= f(v) + 2 m delta max over i = 1..v of (f(v - i) - f(v)) / i,   f(v) = P[Binomial(r, q) >= v],

whatever the attacker does and however the canaries disturb each other. So guesses that are too good refute a claimed epsilon, while a
bound below the claim proves nothing: one run shows less than the truth, the less so the smaller delta and the larger epsilon.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
LARGEST = 50.0
"""Epsilon above which none is looked for."""
FEWEST = 6
"""Guesses below which a plan has no use: five right ones out of five happen by chance more often than once in twenty times."""


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
    """The most that P[at least v of r guesses are right] can be under (epsilon, delta), at most 1. See the top of this file.

    Raises ValueError unless 0 <= v <= r <= m, epsilon >= 0 and 0 <= delta <= 1.
    """
    if not (0 <= v <= r <= m and epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"m = {m}, r = {r}, v = {v}, epsilon = {epsilon}, delta = {delta}: must be 0 <= v <= r <= m, epsilon >= 0, 0 <= delta <= 1")
    q = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(stats.binom.sf(v - 1, r, q))
    last = max(0, math.floor(r * q - 12 * math.sqrt(r * q * (1 - q))) - 1)  # below it f is 1 to all digits: a larger i only divides by more
    if delta == 0 or last >= v:
        return min(tail, 1.0)
    gained = np.cumsum(stats.binom.pmf(np.arange(v - 1, last - 1, -1), r, q))  # f(v - i) - f(v), i = 1..v - last
    return min(tail + 2 * m * delta * float((gained / np.arange(1, v - last + 1)).max()), 1.0)


def lower_bound(m: int, r: int, v: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest epsilon that v right guesses out of r refute: 0 where they refute none.

    The p-value is of (epsilon, delta), and whoever keeps that keeps every larger epsilon as well: so with probability `confidence` no true
    epsilon lies below what is returned.
    """
    def kept(epsilon: float) -> float:
        return p_value(m, r, v, epsilon, delta) - (1 - confidence)

    if kept(0.0) >= 0:
        return 0.0
    return LARGEST if kept(LARGEST) < 0 else float(optimize.brentq(kept, 0.0, LARGEST, xtol=1e-6))


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Delta at `epsilon` of the Gaussian mechanism with sensitivity / standard deviation = mu, exactly (Balle and Wang 2018,
    arXiv:1805.06530, Theorem 8)."""
    return float(stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + float(stats.norm.logcdf(-mu / 2 - epsilon / mu))))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at `delta` of the same."""
    return 0.0 if gaussian_delta(0.0, mu) <= delta else _root(lambda e: gaussian_delta(e, mu) - delta, 0.0, 1e4)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu of the Gaussian mechanism that has `epsilon` at `delta`. Raises ValueError unless both are above 0 and finite."""
    if not (0 < epsilon < math.inf and 0 < delta < 1):
        raise ValueError(f"epsilon = {epsilon}, delta = {delta}: need a finite epsilon above 0 and delta between 0 and 1")
    return _root(lambda mu: gaussian_delta(epsilon, mu) - delta, 1e-6, 2 * math.sqrt(2 * epsilon) + 20)


def expected_bound(m: int, r: int, mu: float, delta: float) -> float:
    """`lower_bound` at the expected number of right guesses, of the Gaussian mechanism with mu and canaries that do not disturb each other.

    The r canaries whose released numbers lie farthest from mu / 2 are guessed.
    """
    def guessed(t: float) -> float:
        return float(stats.norm.sf(t) + stats.norm.sf(t - mu)) - r / m  # those above t, and as many below mu - t

    right = 1.0 if r < m else float(stats.norm.cdf(mu / 2))
    if r < m:
        t = _root(guessed, mu / 2 - 1e-9, mu + 40)
        right = float(stats.norm.sf(t - mu) / (stats.norm.sf(t) + stats.norm.sf(t - mu)))
    return lower_bound(m, r, math.floor(r * right), delta)


def planned_guesses(m: int, epsilon: float, delta: float) -> int:
    """How many guesses to make of m canaries, from public numbers alone: so that the bound of a Gaussian mechanism with half of the noise
    that (epsilon, delta) needs is expected to be largest. Even, so that as many can be "in" as "out"; the fewest where none is better."""
    mu = 2 * gaussian_mu(min(epsilon, LARGEST / 2), delta)
    most = max(1, m // 2)
    choices = sorted({2 * min(most, max(FEWEST // 2, round(2.0**power))) for power in np.arange(1, math.log2(most) + 0.5, 0.5)} or {2 * most})
    return max((r for r in choices if r <= m), key=lambda r: expected_bound(m, r, mu, delta), default=m)


def best_ceiling(m: int, delta: float) -> float:
    """The most that m canaries can show at all: every guess right, of the best number of guesses."""
    choices = {min(m, max(1, round(2.0**power))) for power in np.arange(0, math.log2(max(m, 1)) + 0.5, 0.5)} | {m}
    return max(lower_bound(m, r, r, delta) for r in choices)


def take_guesses(evidence: np.ndarray, count: int) -> np.ndarray:
    """int8 [m]: 1 "in", -1 "out", 0 abstained; `count` guesses where evidence is strongest, fewer where there is not so much.

    Args:
        evidence: float [m], the logarithm of how much likelier what was seen is with the canary in than out; 0: nothing was seen.
    """
    out = np.zeros(len(evidence), np.int8)
    chosen = np.argsort(-np.abs(evidence), kind="stable")[:count]
    out[chosen] = np.sign(evidence[chosen])
    return out


def count_right(guesses: np.ndarray, coins: np.ndarray) -> int:
    """How many of int8 [m] guesses name the side on which bool [m] coins fell."""
    return int(((guesses != 0) & ((guesses > 0) == coins)).sum())


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    return float(optimize.brentq(f, low, high, xtol=1e-9))
