"""Bounding what one unit can contribute: one L2 norm over everything it sends."""

import math

import numpy as np

from fedtune.errors import Refused
from fedtune.types import Arrays

SHRINK = 1.0 - 1e-6
"""Rounding to float32 moves a vector by at most 6e-8 of its length:
clipped a little below the bound it stays within.
"""


def flat_norm(arrays: Arrays) -> float:
    """L2 norm over all tensors, in float64. Not finite where a number is not."""
    return math.sqrt(math.fsum(float(np.square(a.astype(np.float64)).sum()) for a in arrays.values()))


def clip(arrays: Arrays, bound: float) -> tuple[Arrays, float]:
    """(the same scaled down to an L2 norm of at most `bound`, its norm before).

    Raises Refused for NaN or infinity, which no scaling bounds.
    """
    norm = flat_norm(arrays)
    if not math.isfinite(norm):
        raise Refused("not-finite", "a tensor holds NaN or infinity, so it cannot be clipped")
    if norm <= bound * SHRINK:
        return arrays, norm
    factor = bound * SHRINK / norm
    return {name: (a * np.float64(factor)).astype(a.dtype) for name, a in arrays.items()}, norm
