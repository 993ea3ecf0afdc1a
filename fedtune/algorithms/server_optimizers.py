"""An algorithm whose mean gives the direction of a step instead of becoming the model; the steps are in
`fedtune.aggregation.steps`.

On Fed-SB cores this is exact, too: what a step does to R it does to B R A. Under privacy the mean has its
noise already, so nothing more is charged.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from fedtune.aggregation.steps import STEPS, Change
from fedtune.algorithms.base import Algorithm, State
from fedtune.job import FederationSection
from fedtune.types import RoundReport, Update

FIRST, SECOND = "first/", "second/"
"""Slots of a tensor's moments, float64."""


def with_server_optimizer(inner: Algorithm, settings: FederationSection) -> Algorithm:
    """`inner` with federation.server-optimizer behind it.

    A tensor that the round did not move keeps its value and its moments.
    """
    change = STEPS[settings.server_optimizer].change
    if change is None:
        return inner

    def step(state: State, updates: Iterable[Update]) -> tuple[State, RoundReport]:
        after, report = inner.step(state, updates)
        return moved(state, after, settings, change), report

    def settle(state: State, total: np.ndarray, clients: Sequence[str]) -> tuple[State, RoundReport]:
        assert inner.settle is not None
        after, report = inner.settle(state, total, clients)
        return moved(state, after, settings, change), report

    return Algorithm(inner.init, inner.plan, step, settle if inner.settle else None)


def moved(before: State, after: State, settings: FederationSection, change: Change) -> State:
    """The state after a round whose mean is `after.arrays`."""
    arrays, slots = dict(after.arrays), dict(after.slots)
    for name, old in before.arrays.items():
        if np.array_equal(arrays[name], old):
            continue
        delta = arrays[name].astype(np.float64) - old
        first, second = (before.slots.get(kind + name, np.zeros(old.shape)) for kind in (FIRST, SECOND))
        direction, *kept = change(delta, first, second, settings)
        arrays[name] = (old + settings.server_lr * direction).astype(old.dtype)
        slots |= {kind + name: moment for kind, moment in zip((FIRST, SECOND), kept)}
    return replace(after, arrays=arrays, slots=slots)
