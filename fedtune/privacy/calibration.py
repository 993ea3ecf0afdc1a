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
    """The smallest noise multiplier, to DIGITS digits, with which the history has at most `epsilon` at `delta`.

    RDP is quick and finds a bracket; what is returned was read by all accountants that can read the history.

    Args:
        make: the history of one unit, from the multiplier.

    Raises PrivacyRefused where even MOST is too little: other releases of the history already cost too much.
    """
    def fits(z: float, accountants: tuple[str, ...]) -> bool:
        return read_epsilon(make(z), delta, accountants).epsilon <= epsilon

    if not fits(MOST, ("pld", "rdp")):
        raise PrivacyRefused(f"privacy.epsilon = {epsilon:g}: no noise reaches it at delta = {delta:g}; allow a larger epsilon, or send less beside the updates")
    above = _lowest(lambda z: fits(z, ("rdp",)), LEAST, MOST, 1e-2) if fits(MOST, ("rdp",)) else MOST
    found = _lowest(lambda z: fits(z, ("pld", "rdp")), max(LEAST, above / 2), above, 10.0 ** (1 - DIGITS) / 2)
    z = rounded_up(found)
    while not fits(z, ("pld", "rdp")):  # readings are not exactly monotone in their last digits
        z = rounded_up(z * (1 + 2 * 10.0 ** (1 - DIGITS)))
    return z


def rounded_up(z: float) -> float:
    """To DIGITS digits.

    >>> rounded_up(1.23411)
    1.235
    """
    unit = 10.0 ** (math.floor(math.log10(z)) + 1 - DIGITS)
    return round(math.ceil(round(z / unit, 6)) * unit, 12)


def _lowest(fits: Callable[[float], bool], low: float, high: float, precision: float) -> float:
    """The smallest value that fits, within a relative `precision` and from above; `high` fits."""
    if fits(low):
        return low
    while high / low > 1 + precision:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
