"""Which noise gives an epsilon: a search over the accountants' readings that never returns too little."""

import math
from collections.abc import Callable

from fedtune.errors import PrivacyRefused
from fedtune.privacy.accounting import LARGEST, read_epsilon
from fedtune.privacy.releases import History

LEAST, MOST = 0.05, 1e4
"""Noise multipliers that are looked at."""
DIGITS = 4


def calibrate(make: Callable[[float], History], epsilon: float, delta: float) -> float:
    """A noise multiplier of DIGITS digits with which the history has at most `epsilon` at `delta`, within two thousandths of the smallest.

    The search reads by one accountant where that is enough, PLD where it can read the history; what is returned was read by both.

    Args:
        make: the history of one unit, from the multiplier.

    Raises PrivacyRefused where even MOST is too little: other releases of the history already cost too much.
    """
    def over(x: float, accountants: tuple[str, ...]) -> float:
        """log of (epsilon of the multiplier exp(x), over the target); below 0 it fits."""
        return math.log(min(max(read_epsilon(make(math.exp(x)), delta, accountants).epsilon, 1e-9), 10 * LARGEST) / epsilon)

    both = ("pld", "rdp")
    first = read_epsilon(make(1.0), delta, both)
    if over(math.log(MOST), both) > 0:
        raise PrivacyRefused(f"privacy.epsilon = {epsilon:g}: no noise reaches it at delta = {delta:g}; allow a larger epsilon, or send less beside the updates")
    found = _root(lambda x: over(x, first.by[0][0:1]), math.log(LEAST), math.log(MOST))
    if over(found, both) < -1e-3:  # the other one gives less, as RDP does at a tiny epsilon
        found = _root(lambda x: over(x, both), math.log(LEAST), math.log(MOST))
    z = rounded_up(math.exp(found))
    while over(math.log(z), both) > 0:  # readings are not exactly monotone in their last digits
        z = rounded_up(z * (1 + 10.0 ** (1 - DIGITS)))
    return z


def rounded_up(z: float) -> float:
    """To DIGITS digits.

    >>> rounded_up(1.23411)
    1.235
    """
    unit = 10.0 ** (math.floor(math.log10(z)) + 1 - DIGITS)
    return round(math.ceil(round(z / unit, 6)) * unit, 12)


def _root(f: Callable[[float], float], least: float, most: float) -> float:
    """Where the falling `f` crosses 0, to a ten-thousandth; `least` where it is below 0 from there on. `f(most)` is not above 0.

    From 0 it goes by steps of log 2 to either side: the accountants are slow, and may fail, far from where noise is usual.
    """
    from scipy.optimize import brentq

    low = high = 0.0
    if f(0.0) > 0:
        while high < most and f(high) > 0:
            low, high = high, min(most, high + math.log(2))
        if f(high) > 0:  # one accountant gives a little more than the others
            return high
    else:
        while low > least and f(low) <= 0:
            high, low = low, max(least, low - math.log(2))
        if f(low) <= 0:
            return low
    return float(brentq(f, low, high, xtol=1e-4))
