"""Federated averaging over secure sums: the coordinator sees the sum of clipped,
whole-numbered differences and nothing else.

In a simulation the vectors are made and added here, with the arithmetic of the live protocol and
without its masks, so that what clipping, rounding and noise cost shows. A live coordinator gets the sum
and calls `settle` alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from fedtune.algorithms.base import Algorithm, State
from fedtune.algorithms.fed_avg import Draw, fed_avg
from fedtune.privacy.contribution import Secure
from fedtune.privacy.noise import Noise
from fedtune.secagg.masks import sum_plainly
from fedtune.types import RoundReport, Update


def secure_avg(
    *,
    seed: int,
    cohort: int,
    units: tuple[str, ...],
    secure: Secure,
    noise: Callable[[int, str], Noise],
    draw: Draw | None = None,
) -> Algorithm:
    """As `fed_avg` with equal weights and fixed cohorts. noise: of a client in a round, for rounding and,
    where clients are protected, its share. draw: in place of fixed cohorts.

    With fewer clients than the design's threshold the model stays; the report names those who answered.
    """
    plain = fed_avg(seed=seed, cohort=cohort, units=units, weighting="equal", draw=draw)

    def step(state: State, updates: Iterable[Update]) -> tuple[State, RoundReport]:
        round, clients = state.round + 1, list[str]()

        def vectors() -> Iterator[np.ndarray]:
            for update in updates:
                yield secure.vector(update.arrays, update.metrics, state.arrays, noise(round, update.client))
                clients.append(update.client)

        total = sum_plainly(vectors(), secure.terms(bytes(16), round))
        return settle(state, total, clients)

    def settle(state: State, total: np.ndarray, clients: Sequence[str]) -> tuple[State, RoundReport]:
        report = RoundReport(state.round + 1, tuple(clients), float(len(clients)), {})
        if len(clients) < secure.design.threshold:
            return replace(state, round=state.round + 1), report
        change, metrics = secure.change(total, len(clients))
        arrays = {name: (a + change[name]).astype(a.dtype) for name, a in state.arrays.items()}
        return replace(state, round=state.round + 1, arrays=arrays), replace(report, metrics=metrics)

    return Algorithm(plain.init, plain.plan, step, settle)
