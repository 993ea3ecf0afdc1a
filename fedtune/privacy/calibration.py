"""Which noise gives an epsilon: a search over the accountants' readings that never returns too little."""

import math
from collections.abc import Callable

from fedtune.errors import PrivacyRefused
from fedtune.privacy.accounting import read_epsilon
from fedtune.privacy.releases import History

LEAST, MOST = 0.05, 1e4
"""Noise multipliers that are looked at."""
DIGITS = 4


def calibrate(make: Callable[[float], History], epsilon: float, delta: float) -> float:
    """The smallest noise multiplier, to DIGITS digits, with which the history has at
    most `epsilon` at `delta`.

    RDP is quick and finds a bracket; what is returned was read by all accountants that can read the history.

    Args:
        make: the history of one unit, from the multiplier.

    Raises PrivacyRefused where even MOST is too little: other releases of the history already cost too much.
    """

    def over(z: float, accountants: tuple[str, ...]) -> float:
        """Logarithm of what is read over what is allowed: at most 0 where it fits."""
        found = read_epsilon(make(z), delta, accountants).epsilon
        return math.log(min(max(found, 1e-9), 1e9) / epsilon)

    both, quick = ("pld", "rdp"), ("rdp",)
    if over(MOST, both) > 0:
        raise PrivacyRefused(
            f"privacy.epsilon = {epsilon:g}: no noise reaches it at delta = {delta:g}; "
            "allow a larger epsilon, or send less beside the updates"
        )
    above = (
        _root(lambda z: over(z, quick), *_around(lambda z: over(z, quick)), 1e-2)
        if over(MOST, quick) <= 0
        else MOST
    )
    z = rounded_up(
        _root(lambda z: over(z, both), max(LEAST, above / 2), above * 1.02, 10.0 ** (1 - DIGITS) / 2)
    )
    while over(z, both) > 0:  # readings are not exactly monotone in their last digits
        z = rounded_up(z * (1 + 2 * 10.0 ** (1 - DIGITS)))
    return z


def rounded_up(z: float) -> float:
    """To DIGITS digits.

    >>> rounded_up(1.23411)
    1.235
    """
    unit = 10.0 ** (math.floor(math.log10(z)) + 1 - DIGITS)
    return round(math.ceil(round(z / unit, 6)) * unit, 12)


def _around(over: Callable[[float], float]) -> tuple[float, float]:
    """Two values, of which the second fits and the first does not, unless it is LEAST: found from 1, as
    readings at very little noise are slow.
    """
    low = high = 1.0
    while high < MOST and over(high) > 0:
        low, high = high, min(2 * high, MOST)
    while low > LEAST and over(low) <= 0:
        low, high = max(low / 2, LEAST), low
    return low, high


def _root(over: Callable[[float], float], low: float, high: float, precision: float) -> float:
    """Where `over` becomes 0, within a relative `precision`; `low` where it is 0 there already."""
    from scipy.optimize import brentq

    if over(low) <= 0:
        return low
    return math.exp(brentq(lambda x: over(math.exp(x)), math.log(low), math.log(high), xtol=precision))
