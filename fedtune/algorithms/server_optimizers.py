"""What the coordinator makes of a round's mean: instead of becoming the model, it gives the direction of a
step (Reddi et al. 2021, arXiv:2003.00295).

    Delta = mean - model
    fedavgm   m <- beta m + Delta;   model <- model + eta m
              (Hsu et al. 2019, arXiv:1909.06335, section 4.3)
    fedadam   m <- beta m + (1 - beta) Delta;   v <- beta2 v + (1 - beta2) Delta^2;
              model <- model + eta m / (sqrt(v) + tau)
              (Reddi et al., Algorithm 2; no bias correction)

On Fed-SB cores this is exact, too: what a step does to R it does to B R A. Under privacy the mean has its
noise already, so nothing more is charged.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from fedtune.algorithms.base import Algorithm, State
from fedtune.job import FederationSection
from fedtune.types import RoundReport, Update

FIRST, SECOND = "first/", "second/"
"""Slots of a tensor's moments, float64."""


def with_server_optimizer(inner: Algorithm, settings: FederationSection) -> Algorithm:
    """`inner` with federation.server-optimizer behind it.

    A tensor that the round did not move keeps its value and its moments.
    """
    if settings.server_optimizer == "average":
        return inner

    def step(state: State, updates: Iterable[Update]) -> tuple[State, RoundReport]:
        after, report = inner.step(state, updates)
        return moved(state, after, settings), report

    def settle(state: State, total: np.ndarray, clients: Sequence[str]) -> tuple[State, RoundReport]:
        assert inner.settle is not None
        after, report = inner.settle(state, total, clients)
        return moved(state, after, settings), report

    return Algorithm(inner.init, inner.plan, step, settle if inner.settle else None)


def moved(before: State, after: State, settings: FederationSection) -> State:
    """The state after a round whose mean is `after.arrays`."""
    rule: Callable[..., tuple[np.ndarray, ...]] = (
        _fedavgm if settings.server_optimizer == "fedavgm" else _fedadam
    )
    arrays, slots = dict(after.arrays), dict(after.slots)
    for name, old in before.arrays.items():
        if np.array_equal(arrays[name], old):
            continue
        delta = arrays[name].astype(np.float64) - old
        moments = [before.slots.get(kind + name, np.zeros(old.shape)) for kind in (FIRST, SECOND)]
        change, *kept = rule(delta, *moments, settings)
        arrays[name] = (old + settings.server_lr * change).astype(old.dtype)
        slots |= {kind + name: moment for kind, moment in zip((FIRST, SECOND), kept)}
    return replace(after, arrays=arrays, slots=slots)


def _fedavgm(
    delta: np.ndarray, first: np.ndarray, second: np.ndarray, settings: FederationSection
) -> tuple[np.ndarray, ...]:
    first = settings.server_momentum * first + delta
    return first, first


def _fedadam(
    delta: np.ndarray, first: np.ndarray, second: np.ndarray, settings: FederationSection
) -> tuple[np.ndarray, ...]:
    first = settings.server_momentum * first + (1 - settings.server_momentum) * delta
    second = settings.server_beta2 * second + (1 - settings.server_beta2) * delta**2
    return first / (np.sqrt(second) + settings.server_tau), first, second
