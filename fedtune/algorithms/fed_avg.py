"""Federated averaging (McMahan et al. 2017, arXiv:1602.05629v4, Algorithm 1).

On Fed-SB cores the mean is exact.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from fedtune.aggregation.mean import Mean, weighted_mean
from fedtune.algorithms.base import Algorithm, State
from fedtune.common.seeds import generator
from fedtune.types import Arrays, Assignment, ClientInfo, RoundReport, Update


def fed_avg(
    *,
    seed: int,
    cohort: int,
    units: tuple[str, ...],
    sampling: Literal["fixed", "poisson"] = "fixed",
    weighting: Literal["examples", "equal"] = "examples",
    average: Callable[[Iterable[Update], Arrays], Mean] | None = None,
) -> Algorithm:
    """Draw a cohort, let each train all `units`, average what comes back.

    Args:
        seed: of the cohort draws.
        cohort: clients a round; with sampling "poisson", their expected number.
        units: what every client trains.
        sampling: "fixed" draws exactly min(cohort, clients) without replacement; "poisson" includes each
            client independently with probability cohort / clients, and a round may be empty.
        weighting: "examples" weighs a client by its examples, "equal" counts each once.
        average: in place of the weighted mean; see `fedtune.aggregation.robust`.
    """

    def init(arrays: Arrays) -> State:
        return State(round=0, arrays=dict(arrays))

    def plan(state: State, clients: Sequence[ClientInfo]) -> tuple[Assignment, ...]:
        drawn = draw_cohort(clients, cohort, sampling, generator(seed, "cohort", state.round + 1))
        return tuple(Assignment(client=c.name, round=state.round + 1, units=units) for c in drawn)

    def step(state: State, updates: Iterable[Update]) -> tuple[State, RoundReport]:
        mean = (
            average(updates, state.arrays)
            if average
            else weighted_mean(updates, state.arrays, equal=weighting == "equal")
        )
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


def draw_cohort(
    clients: Sequence[ClientInfo], cohort: int, sampling: str, rng: np.random.Generator
) -> list[ClientInfo]:
    """The clients of one round, in the order of `clients`. Sampling as in `fed_avg`."""
    if sampling == "poisson":
        chosen = np.flatnonzero(rng.random(len(clients)) < cohort / max(1, len(clients)))
    else:
        chosen = np.sort(rng.choice(len(clients), size=min(cohort, len(clients)), replace=False))
    return [clients[i] for i in chosen.tolist()]
