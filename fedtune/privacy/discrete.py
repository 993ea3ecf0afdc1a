"""Noise on whole numbers that clients add each for themselves: conditional rounding
and the discrete Gaussian.

    P[X = x] is proportional to exp(-x^2 / (2 sigma^2)), x any whole number

Sources: Kairouz, Liu, Steinke 2021, arXiv:2102.06387 (Theorem 1, section 4.1, Proposition 14), whose formulas
were checked against the released code of its authors (google-research/federated, distributed_dp; TensorFlow
Federated, `inflated_l2_norm_bound`), not against the text of the paper; Canonne, Kamath, Steinke 2020,
arXiv:2004.00010, Algorithm 3, for the sampling.
"""

import math
from collections.abc import Callable

import numpy as np

from fedtune.errors import PrivacyRefused

Uniform = Callable[[int], np.ndarray]
"""n -> [n] numbers in [0, 1), multiples of 2^-53: `Noise.uniform`."""
BETA = math.exp(-0.5)
"""Chance, at most, of a rounding that is drawn again; the paper's choice."""
TRIES = 1000
"""Roundings in a row that may fail: BETA ** TRIES is 1e-217."""
SMALLEST = 0.5
"""Standard deviation in steps from which `shortfall` holds."""


def rounded_norm(bound: float, size: int) -> float:
    """The L2 norm, in steps, that a vector of norm `bound` (in steps) has at most once rounded with
    probability at least 1 - BETA.

    min{ sqrt(C^2 + d / 4 + sqrt(2 ln(1 / BETA)) (C + sqrt(d) / 2)), C + sqrt(d) } for d = `size`
    numbers and granularity 1.
    """
    root = math.sqrt(size)
    return min(
        math.sqrt(bound**2 + size / 4 + math.sqrt(2 * math.log(1 / BETA)) * (bound + root / 2)), bound + root
    )


def round_within(exact: np.ndarray, bound: float, uniform: Uniform) -> np.ndarray:
    """[n] int64: each number to a neighbouring whole one, the nearer one more often, so that the mean stays;
    drawn again until the L2 norm is at most `bound`.

    Raises PrivacyRefused when it never is: `exact` was longer than `bound` is for.
    """
    low = np.floor(exact)
    part = exact - low
    for _ in range(TRIES):
        found = low + (uniform(exact.size) < part)
        if math.sqrt(float(found @ found)) <= bound:
            return found.astype(np.int64)
    raise PrivacyRefused(
        f"a vector of {math.sqrt(float(exact @ exact)):.6g} steps does not round to at most "
        f"{bound:.6g}; nothing was sent"
    )


def discrete_gaussian(sigma: float, size: int, uniform: Uniform) -> np.ndarray:
    """[size] int64, independent, of parameter `sigma` in steps (from SMALLEST on also their standard
    deviation, to 3 %, from 1 on to 1e-6).

    A discrete Laplace number y of scale t = floor(sigma) + 1 is taken with probability
    exp(-(|y| - sigma^2 / t)^2 / (2 sigma^2)). Exact but for the 53 bits of the uniform numbers and of exp and
    log, also in the tails, for sigma up to 2^44.
    """
    found, count = [np.zeros(0, np.int64)], 0
    while count < size:
        y = _discrete_laplace(math.floor(sigma) + 1, 64 + 3 * (size - count), uniform)
        taken = y[
            uniform(y.size)
            < np.exp(-((np.abs(y) - sigma**2 / (math.floor(sigma) + 1)) ** 2) / (2 * sigma**2))
        ]
        found.append(taken.astype(np.int64))
        count += taken.size
    return np.concatenate(found)[:size]


def _discrete_laplace(scale: int, tries: int, uniform: Uniform) -> np.ndarray:
    """Up to `tries` whole numbers y as float64, with probability in proportion to exp(-|y| / scale):
    u + scale * v, u below scale and taken with probability exp(-u / scale), v geometric; with a sign, of
    which zero has one (arXiv:2004.00010, Algorithm 2).
    """
    low = np.floor(scale * uniform(tries))
    low = low[uniform(tries) < np.exp(-low / scale)]
    y = low + scale * np.floor(-np.log1p(-uniform(low.size)))
    minus = uniform(y.size) < 0.5
    return np.where(minus, -y, y)[~(minus & (y == 0))]


def shortfall(sigma: float, clients: int, size: int) -> float:
    """tau sqrt(d): what the sum of `clients` discrete Gaussians of `sigma` steps on d = `size` numbers falls
    short of one of variance clients * sigma^2; it is added to sensitivity / (sqrt(clients) sigma), whose half
    square is then the zCDP of the sum.

    tau = 10 sum over k = 1 .. clients - 1 of exp(-2 pi^2 sigma^2 k / (k + 1)).
    Raises ValueError below SMALLEST.
    """
    if sigma < SMALLEST:
        raise ValueError(f"noise of {sigma:g} steps: must be at least {SMALLEST:g}")
    return (
        10
        * math.sqrt(size)
        * math.fsum(math.exp(-2 * math.pi**2 * sigma**2 * k / (k + 1)) for k in range(1, clients))
    )
