"""Who is whose neighbour, how many neighbours are enough, and how many must answer.

Bell et al. 2020, ePrint 2020/704: clients stand on a ring in random order, and each deals with the k/2 on
either side (a Harary graph).
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from fedtune.secagg.terms import MAX_CLIENTS, MAX_NEIGHBOURS

COMPLETE = 40
"""Cohorts up to this have everyone as everyone's neighbour: a sparse graph would save next to nothing."""


@dataclass(frozen=True)
class Design:
    """degree: neighbours of a client, even unless it is everyone. threshold: how many holders of a
    client's shares (its neighbours and itself) open one of its secrets; more than half of them. Raises
    ValueError for anything else.
    """

    degree: int
    threshold: int

    def __post_init__(self) -> None:
        if not 1 <= self.degree <= MAX_NEIGHBOURS:
            raise ValueError(f"{self.degree} neighbours, must be 1 to {MAX_NEIGHBOURS}")
        if not (self.degree + 1) < 2 * self.threshold <= 2 * (self.degree + 1):
            raise ValueError(
                f"threshold {self.threshold} of {self.degree + 1} holders of shares: must be more than half "
                "of them, and no more than there are"
            )


def design(
    cohort: int, *, colluding: float = 0.1, dropout: float = 0.2, secrecy: int = 40, correctness: int = 30
) -> Design:
    """The smallest degree, and its threshold, that keep both failures unlikely;
    for small cohorts the complete graph.

    Up to 40 clients: everyone, and threshold ceil(2n / 3) or the next number above half; tolerates
    n - threshold drop-outs. Else, with c = ceil(colluding * n) and d = ceil(dropout * n), the smallest even k
    for which some t > (k + 1) / 2 has

        n * P[H(n - 1, c, k) >= t]      <= 2^-secrecy       no client has t neighbours that collude
        n * P[k / 2 in a row are bad]   <= 2^-secrecy       the ring does not fall apart; bad: c + d of n,
                                                            C(n - k/2, b - k/2) / C(n, b)
        n * P[H(n - 1, d, k) > k - t]   <= 2^-correctness   every client has t neighbours left

    H(N, m, k): how many of m marked ones are among k drawn from N without replacement, which is what random
    places on the ring give; who colludes and who is gone must not depend on the places, so they are drawn
    once the cohort is there. The first and second are the conditions of Bell et al., section 3, with the
    exact tails in place of their bounds. Where no k below n - 1 will do, the complete graph.

    Args:
        colluding, dropout: fractions of the cohort, at most: that tell the coordinator all they know; that
            fail after having shared.
        secrecy, correctness: bits.

    Raises ValueError for a cohort below 2 or above MAX_CLIENTS, for fractions outside [0, 1), or where a
    complete graph is needed and too large.
    """
    if not 2 <= cohort <= MAX_CLIENTS:
        raise ValueError(f"a cohort of {cohort}, must be 2 to {MAX_CLIENTS}")
    if not (0 <= colluding < 1 and 0 <= dropout < 1):
        raise ValueError(
            f"colluding {colluding} and dropout {dropout}: must be fractions of the cohort, 0 to below 1"
        )
    # Fractions of the decimal text: 0.1 * 30 as floats is just above 3, whose ceiling would be 4.
    c, d = (math.ceil(Fraction(str(f)) * cohort) for f in (colluding, dropout))
    for k in range(4, min(cohort - 1, MAX_NEIGHBOURS + 1), 2) if cohort > COMPLETE else ():
        t = _threshold(cohort, k, c, d, secrecy, correctness)
        if t:
            return Design(k, t)
    if cohort - 1 > MAX_NEIGHBOURS:
        raise ValueError(
            f"no graph of at most {MAX_NEIGHBOURS} neighbours holds {colluding:g} colluding and {dropout:g} "
            f"drop-outs of {cohort}: lower one of them"
        )
    return Design(cohort - 1, max(math.ceil(2 * cohort / 3), cohort // 2 + 1))


def neighbours(count: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """The neighbours of each of `count` clients, by their places on the ring, in order.

    >>> neighbours(5, 2)
    ((1, 4), (0, 2), (1, 3), (2, 4), (0, 3))
    """
    if count - 1 <= degree:
        return tuple(tuple(j for j in range(count) if j != i) for i in range(count))
    steps = [s for s in range(-(degree // 2), degree // 2 + 1) if s]
    return tuple(tuple(sorted((i + s) % count for s in steps)) for i in range(count))


def _threshold(n: int, k: int, c: int, d: int, secrecy: int, correctness: int) -> int:
    """The smallest threshold that meets the three conditions of `design`, or 0."""
    bad, half = min(c + d, n), k // 2
    if half <= bad and math.log2(n) + _log2_choose(n - half, bad - half) - _log2_choose(n, bad) > -secrecy:
        return 0
    for t in range(half + 1, k + 1):
        if math.log2(n) + _tail(n - 1, c, k, t) <= -secrecy:
            return t if math.log2(n) + _tail(n - 1, d, k, k - t + 1) <= -correctness else 0
    return 0


def _tail(total: int, marked: int, drawn: int, least: int) -> float:
    """log2 of the probability that at least so many of the drawn are marked; -inf where it is impossible."""
    ways = [
        _log2_choose(marked, i) + _log2_choose(total - marked, drawn - i) for i in range(least, drawn + 1)
    ]
    top = max(ways)
    return (
        -math.inf
        if top == -math.inf
        else top + math.log2(sum(2 ** (w - top) for w in ways)) - _log2_choose(total, drawn)
    )


def _log2_choose(n: int, k: int) -> float:
    if not 0 <= k <= n:
        return -math.inf
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
