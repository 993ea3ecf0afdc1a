"""Client-level privacy without trust in the coordinator: each client adds its share of the
noise before a secure sum.

A client clips its difference to the L2 norm C, rounds it to the grid of the sum, where its norm is at most
C', and adds discrete Gaussian noise of variance (z C')^2 / m to each number, m the fewest clients that a sum
can hold (the threshold of the design). So every sum that opens has noise of multiplier z over C', or more: up
to cohort / m times the variance when nobody drops out.
"""

import math
from dataclasses import dataclass

import numpy as np

from fedtune.errors import PrivacyRefused
from fedtune.privacy.discrete import discrete_gaussian, round_within, rounded_norm, shortfall
from fedtune.privacy.noise import Noise, as_promised
from fedtune.secagg.quantise import Grid, headroom
from fedtune.secagg.terms import MAX_LENGTH

STEPS = 2**16
"""From 0 to the clip, at least; the grid has them."""
TAIL = 12.0
"""Standard deviations of a client's noise that the modulus has room for: one number is beyond with chance
below 4e-33, so in 2^26 numbers of 1,000 clients over 1,000 rounds with one below 3e-19. What wraps around
costs accuracy, never privacy.
"""
FLOOR = 1e-9
"""Least excess of a distributed release.

Above 0, so that only zCDP is claimed: a continuous Gaussian's PLD is no bound for a discrete one.
"""


@dataclass(frozen=True)
class Distributed:
    """What one client draws. norm: C' in steps. sigma: of each number, in steps."""

    norm: float
    sigma: float

    def shares(self, exact: np.ndarray, source: Noise) -> np.ndarray:
        """[n] int64: `exact`, [n] in steps and of norm at most C, rounded and with this client's noise, which
        is measured before it leaves.

        Raises PrivacyRefused when the noise is not of the size that was promised.
        """
        drawn = discrete_gaussian(self.sigma, exact.size, source.uniform)
        squares = float(np.square(drawn, dtype=np.float64).sum())
        if not as_promised(squares, exact.size, self.sigma):
            raise PrivacyRefused(
                f"this client's noise measured {math.sqrt(squares / exact.size):.4g} steps, "
                f"{self.sigma:.4g} were promised; nothing was sent"
            )
        return round_within(exact, self.norm, source.uniform) + drawn


def distributed(
    clip: float, multiplier: float, size: int, cohort: int, fewest: int
) -> tuple[Grid, Distributed]:
    """The grid and the noise for vectors of `size` numbers, `cohort` clients and at least `fewest` in a sum.

    Raises ValueError where 64 bits leave no STEPS to the clip.
    """
    share = multiplier / math.sqrt(fewest)
    longest = rounded_norm(STEPS, size) / STEPS * clip  # the grid is at least so fine
    grid = headroom(clip, cohort, noise=TAIL * share * longest, steps=STEPS)
    norm = rounded_norm(clip * grid.scale, size)
    return grid, Distributed(norm, share * norm)


def excess(multiplier: float, fewest: int) -> float:
    """Of a distributed release, over 1 / multiplier: at the coarsest grid and the longest vector there may
    be, so that it holds for all.
    """
    sigma = multiplier * STEPS / math.sqrt(fewest)
    if sigma < 1:
        raise PrivacyRefused(
            f"privacy.noise-multiplier = {multiplier:g}: gives noise of {sigma:.2g} steps on a client, "
            "at least 1 is needed; raise it"
        )
    return FLOOR + shortfall(sigma, fewest, MAX_LENGTH)
