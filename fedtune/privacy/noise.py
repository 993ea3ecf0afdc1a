"""Randomness that privacy rests on.

The operating system's, or for tests and comparisons a seed's, which protects nobody.
"""

import math
import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedtune.common.seeds import generator
from fedtune.job import Job


def as_promised(squares: float, count: int, sigma: float) -> bool:
    """Whether `count` numbers with this sum of squares can be noise of standard deviation sigma: a mean
    square further from sigma^2 than this comes by chance less often than 2e-12, which no delta notices
    (Laurent and Massart 2000, Annals of Statistics 28, Lemma 1, with x = 28).
    """
    n = max(1, count)
    return abs(squares / n / sigma**2 - 1) <= 2 * math.sqrt(28 / n) + 2 * 28 / n


class Noise(Protocol):
    """`private`: whether nobody can know what was drawn."""

    @property
    def private(self) -> bool: ...

    def normal(self, *shape: int) -> np.ndarray:
        """Standard normal numbers, float64."""
        ...

    def uniform(self, *shape: int) -> np.ndarray:
        """Numbers in [0, 1), float64, multiples of 2^-53."""
        ...


class SystemNoise:
    """From the operating system's generator.

    A normal number is the sum of four, halved, so that the low bits of a noisy figure do not tell which of
    the few floating-point numbers lies under it (Holohan and Braghin 2021, arXiv:2107.10138, section 3.2;
    Mironov 2012 found the attack).
    """

    private = True

    def uniform(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        bits = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(11)
        return (bits.astype(np.float64) * 2.0**-53).reshape(shape)

    def normal(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(2, count)))
        angle = 2.0 * np.pi * self.uniform(2, count)
        # Box and Muller: both of each pair
        return (0.5 * (radius * (np.cos(angle) + np.sin(angle))).sum(0)).reshape(shape)


@dataclass(frozen=True)
class SeededNoise:
    """From a generator with a seed: the same run again gives the same numbers. Not private."""

    rng: np.random.Generator
    private = False

    def uniform(self, *shape: int) -> np.ndarray:
        return self.rng.random(shape)

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape)


def noise_of(job: Job, round: int, client: str, purpose: str = "privacy") -> Noise:
    """The randomness of one client's round, or (client "") of the coordinator's; each purpose has its own."""
    if job.privacy.noise == "system":
        return SystemNoise()
    return SeededNoise(generator(job.federation.seed, purpose, round, client))
