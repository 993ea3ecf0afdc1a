"""Floats to integers modulo 2^k and back, so that sums of them do not wrap around.

Stochastic rounding to a grid: a number y between two steps goes up with probability y - floor(y), so that its
mean is y and the errors of many clients cancel; the error of one is below one step, 1 / scale.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedtune.errors import Refused

Uniform = Callable[[int], np.ndarray]
"""n -> [n] numbers in [0, 1), for instance the method `random` of a numpy Generator.

It rounds and hides nothing: the masks do.
"""
_EXACT = 2.0**52  # floats beyond it have no fractions left to round
_FINE = 2.0**40


@dataclass(frozen=True)
class Grid:
    """clip: largest absolute value of a number. scale: steps to 1. bits: 32 or 64, of the
    modulus. most: clients in a sum, at most. noise: a bound on what each client adds besides to a
    number, in the unit of clip.

    Raises ValueError unless most * (ceil(clip * scale) + 1 + ceil(noise * scale)) < 2^(bits - 1): then no sum
    of so many wraps around.
    """

    clip: float
    scale: float
    bits: int
    most: int
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.bits not in (32, 64):
            raise ValueError(f"bits: {self.bits}, must be 32 or 64")
        if not (
            0 < self.clip < math.inf
            and 0 < self.scale < math.inf
            and 0 <= self.noise < math.inf
            and self.most >= 1
        ):
            raise ValueError(
                f"clip {self.clip:g}, scale {self.scale:g}, noise {self.noise:g}, {self.most} clients: "
                "must be finite, above 0 (noise: or 0)"
            )
        if (self.clip + self.noise) * self.scale > _EXACT:
            raise ValueError(
                f"clip {self.clip:g} (with noise {self.clip + self.noise:g}) at scale {self.scale:g} "
                "is beyond 2^52 steps, where floats are whole: lower the scale"
            )
        if self.most * self.bound >= 2 ** (self.bits - 1):
            raise ValueError(
                f"{self.most} clients of up to {self.bound} steps (clip {self.clip:g}, "
                f"noise {self.noise:g}, scale {self.scale:g}) wrap around 2^{self.bits}: lower scale, "
                f"clip or the cohort{', or take 64 bits' if self.bits == 32 else ''}"
            )

    @property
    def bound(self) -> int:
        """The largest absolute value of a client's integers."""
        return math.ceil(self.clip * self.scale) + 1 + math.ceil(self.noise * self.scale)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(f"<u{self.bits // 8}")


def headroom(clip: float, cohort: int, *, noise: float = 0.0, steps: int = 2**16) -> Grid:
    """The grid for sums of `cohort` clients: 32 bits if these leave at least `steps` steps
    from 0 to clip, else 64.

    The scale is the largest power of two that fits, and no more than 2^40 steps to clip: a float32 has 2^24.

    Raises ValueError where 64 bits do not leave so many steps either.
    """
    if not (0 < clip < math.inf and 0 <= noise < math.inf and cohort >= 1):
        raise ValueError(
            f"clip {clip:g}, noise {noise:g}, a cohort of {cohort}: must be finite and above 0 (noise: or 0)"
        )
    for bits in (32, 64):
        # Three steps a client are for rounding up: of clip, of noise, and the one of the bound.
        room = 2 ** (bits - 1) / cohort - 3
        power = min(room / (clip + noise), _FINE / clip, _EXACT / (clip + noise))
        scale = 2.0 ** math.floor(math.log2(power)) if power > 0 else 0.0
        if clip * scale >= steps or (bits == 64 and power == _FINE / clip):
            return Grid(clip, scale, bits, cohort, noise)
    raise ValueError(
        f"no {steps} steps from 0 to clip {clip:g} with {cohort} clients and noise {noise:g}, "
        "even with 64 bits: lower the cohort, the noise or the steps"
    )


def quantise(vector: np.ndarray, grid: Grid, uniform: Uniform) -> np.ndarray:
    """[n] floats to [n] unsigned integers; negative ones wrap (two's complement). Exact zeros stay 0.

    Raises ValueError when a number is not finite or beyond the clip: clip before.
    """
    exact = vector.astype(np.float64)
    if not (np.abs(exact) <= grid.clip).all():  # false for NaN, too
        raise ValueError(
            f"a number is not finite or beyond the clip of {grid.clip:g}: clip the vector before"
        )
    exact *= grid.scale
    low = np.floor(exact)
    low += uniform(exact.size) < exact - low
    return low.astype(np.int64).astype(grid.dtype)


def dequantise(total: np.ndarray, grid: Grid, clients: int) -> np.ndarray:
    """[n] float64: the sum of `clients` vectors, from the sum of their integers modulo 2^bits.

    Raises ValueError for more clients than the grid is for, and Refused("range") when a number is larger than
    the sum of so many can be: then some client sent what no vector becomes.
    """
    if not 1 <= clients <= grid.most:
        raise ValueError(f"a sum of {clients} clients, the grid is for 1 to {grid.most}")
    signed = total.astype(grid.dtype, copy=False).view(f"<i{grid.bits // 8}").astype(np.int64)
    limit = clients * grid.bound
    if ((signed > limit) | (signed < -limit)).any():
        raise Refused(
            "range",
            f"a sum of {clients} clients is beyond {clients} times {grid.bound} steps: "
            "a vector in it was not made with this grid",
        )
    return signed / grid.scale
