"""Federated averaging (McMahan et al. 2017, arXiv:1602.05629v4, Algorithm 1).

On Fed-SB cores the mean is exact.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import numpy as np

from fedtune.aggregation.mean import Mean, weighted_mean
from fedtune.algorithms.base import Algorithm, State
from fedtune.common.seeds import generator
from fedtune.types import Arrays, Assignment, ClientInfo, RoundReport, Update

Draw = Callable[[Sequence[ClientInfo], int, np.random.Generator], Sequence[ClientInfo]]
"""(clients that can be asked, round, generator of the round) -> those of the round."""


def fed_avg(
    *,
    seed: int,
    cohort: int,
    units: tuple[str, ...],
    sampling: Literal["fixed", "poisson"] = "fixed",
    weighting: Literal["examples", "equal"] = "examples",
    average: Callable[[Iterable[Update], Arrays], Mean] | None = None,
    draw: Draw | None = None,
) -> Algorithm:
    """Draw a cohort, let each train all `units`, average what comes back.

    Args:
        seed: of the cohort draws.
        cohort: clients a round; with sampling "poisson", their expected number.
        units: what every client trains.
        sampling: "fixed" draws exactly min(cohort, clients) without replacement; "poisson" includes each
            client independently with probability cohort / clients, and a round may be empty.
        weighting: "examples" weighs a client by its examples, "equal" counts each once.
        average: in place of the weighted mean; see `fedtune.aggregation.rules`.
        draw: in place of `sampling`.
    """
    draw = draw or drawing(sampling, cohort)
    average = average or partial(weighted_mean, equal=weighting == "equal")

    def init(arrays: Arrays) -> State:
        return State(round=0, arrays=dict(arrays))

    def plan(state: State, clients: Sequence[ClientInfo]) -> tuple[Assignment, ...]:
        drawn = draw(clients, state.round + 1, generator(seed, "cohort", state.round + 1))
        return tuple(Assignment(client=c.name, round=state.round + 1, units=units) for c in drawn)

    def step(state: State, updates: Iterable[Update]) -> tuple[State, RoundReport]:
        mean = average(updates, state.arrays)
        aside = dict.fromkeys(mean.aside, "aggregation: too far from the others, left out")
        report = RoundReport(
            round=state.round + 1,
            clients=mean.clients,
            weight=mean.weight,
            metrics=mean.metrics,
            refused=aside,
        )
        return State(state.round + 1, mean.arrays, state.slots), report

    return Algorithm(init, plan, step)


def drawing(sampling: str, cohort: int) -> Draw:
    """As `draw_cohort`, whatever the round."""
    return lambda clients, round, rng: draw_cohort(clients, cohort, sampling, rng)


def draw_cohort(
    clients: Sequence[ClientInfo], cohort: int, sampling: str, rng: np.random.Generator
) -> list[ClientInfo]:
    """The clients of one round, in the order of `clients`. Sampling as in `fed_avg`."""
    if sampling == "poisson":
        chosen = np.flatnonzero(rng.random(len(clients)) < cohort / max(1, len(clients)))
    else:
        chosen = np.sort(rng.choice(len(clients), size=min(cohort, len(clients)), replace=False))
    return [clients[i] for i in chosen.tolist()]
