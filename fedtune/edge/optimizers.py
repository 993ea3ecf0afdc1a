"""torch.optim's SGD and AdamW in numpy, on all trained numbers as one vector."""

import math

import numpy as np

from fedtune.adapters.spec import AdapterSpec
from fedtune.job import FederationSection
from fedtune.round.rates import BETA1, BETA2, EPS, learning_rate


class Optimizer:
    """The job's optimizer of one round, fresh.

    Formulas, their order of operations and their rounding to float32 are those of
    torch.optim (tests compare).
    """

    def __init__(self, spec: AdapterSpec, settings: FederationSection, round: int) -> None:
        self.settings, self.rates = settings, rates(spec, settings, round)
        self._first: np.ndarray | None = None
        self._second: np.ndarray | None = None
        self._count = 0

    def step(self, values: np.ndarray, gradient: np.ndarray) -> None:
        """Moves `values`, float32 [P], in place by one step along `gradient`, float32 [P],
        which is left as it was.
        """
        self._count += 1
        if self.settings.optimizer == "sgd":
            self._sgd(values, gradient)
        else:  # adam too: the two are one here
            self._adamw(values, gradient)

    def _sgd(self, values: np.ndarray, g: np.ndarray) -> None:
        decay, momentum = np.float32(self.settings.weight_decay), np.float32(self.settings.momentum)
        if decay:
            g = g + decay * values
        if momentum:
            self._first = g.copy() if self._first is None else momentum * self._first + g
            g = self._first
        values -= self.rates.astype(np.float32) * g

    def _adamw(self, values: np.ndarray, g: np.ndarray) -> None:
        """Loshchilov and Hutter 2019, arXiv:1711.05101, Algorithm 2, with a schedule of 1."""
        if self._first is None or self._second is None:
            self._first, self._second = np.zeros_like(g), np.zeros_like(g)
        if self.settings.weight_decay:
            values *= (1 - self.rates * self.settings.weight_decay).astype(np.float32)
        self._first += np.float32(1 - BETA1) * (g - self._first)
        self._second *= np.float32(BETA2)
        self._second += np.float32(1 - BETA2) * g * g
        denominator = np.sqrt(self._second) / np.float32(math.sqrt(1 - BETA2**self._count)) + np.float32(EPS)
        values -= (self.rates / (1 - BETA1**self._count)).astype(np.float32) * self._first / denominator


def rates(spec: AdapterSpec, settings: FederationSection, round: int) -> np.ndarray:
    """Learning rate of each trained number, float64 [P], or [1] where all have the same."""
    by_tensor = [learning_rate(settings, t.name, round) for t in spec.trainable]
    if len(set(by_tensor)) == 1:
        return np.array(by_tensor[:1])
    return np.repeat(np.array(by_tensor), [t.size for t in spec.trainable])
