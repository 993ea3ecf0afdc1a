"""Federated averaging that protects whole clients (McMahan et al. 2018, arXiv:1710.06963, Algorithm 1; Andrew
et al. 2021, arXiv:1905.03871v5, Algorithm 1, for the clip that adapts).

    w <- w + (sum over the cohort of clip(u - w, C) + N(0, (z C)^2)) / m

with m the expected cohort, whatever came back: a denominator that followed the data would tell about it. A
client that does not answer, or whose update is refused, adds nothing; a round without any is noise alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedtune.algorithms.base import Algorithm, State
from fedtune.algorithms.fed_avg import draw_cohort
from fedtune.common.seeds import generator
from fedtune.errors import PrivacyRefused, Refused, ShapeMismatch
from fedtune.privacy.client import METRIC_NORM, ClientPrivacy
from fedtune.privacy.clipping import clip as clipped
from fedtune.privacy.noise import Noise, as_promised
from fedtune.privacy.plan import bounded_scores, scored
from fedtune.types import Arrays, Assignment, ClientInfo, Metrics, RoundReport, Update

CLIP = "clip"
"""Slot of the clip of the next round."""


def dp_fed_avg(
    *,
    seed: int,
    cohort: int,
    units: tuple[str, ...],
    sampling: str,
    privacy: ClientPrivacy,
    noise: Callable[[int], Noise],
    secret: bool,
) -> Algorithm:
    """As `fed_avg`, with noise.

    Args:
        noise: the randomness of a round.
        secret: draw cohorts with it, so that nobody who knows the seed knows them; else by the seed.
    """

    def init(arrays: Arrays) -> State:
        return State(0, dict(arrays), {CLIP: np.array(privacy.clip)})

    def plan(state: State, clients: Sequence[ClientInfo]) -> tuple[Assignment, ...]:
        round = state.round + 1
        rng = _generator(noise(round)) if secret else generator(seed, "cohort", round)
        return tuple(Assignment(c.name, round, units) for c in draw_cohort(clients, cohort, sampling, rng))

    def step(state: State, updates: Iterable[Update]) -> tuple[State, RoundReport]:
        round, source, bound = state.round + 1, noise(state.round + 1), float(state.slots[CLIP])
        sums = _Sums({name: np.zeros(a.shape) for name, a in state.arrays.items()})
        for update in updates:
            sums.add(update, state.arrays, bound)
        drawn = drawn_noise(state.arrays, privacy.multiplier * bound, source)
        arrays = {
            name: (a + (sums.delta[name] + drawn[name]) / cohort).astype(a.dtype)
            for name, a in state.arrays.items()
        }
        slots = state.slots | {
            CLIP: np.array(_adapted(bound, sums.within, len(sums.clients), cohort, privacy, source))
        }
        report = RoundReport(
            round, tuple(sums.clients), float(cohort), _metrics(sums, cohort, privacy, source)
        )
        return replace(state, round=round, arrays=arrays, slots=slots), report

    return Algorithm(init, plan, step)


@dataclass
class _Sums:
    """Over the updates of a round: clipped differences, how many were within the
    clip, and bounded metrics.
    """

    delta: Arrays
    within: int = 0
    scores: np.ndarray = field(default_factory=lambda: np.zeros(2))
    clients: list[str] = field(default_factory=list)

    def add(self, update: Update, model: Arrays, bound: float) -> None:
        if wrong := next(
            (n for n, a in update.arrays.items() if n not in model or a.shape != model[n].shape), None
        ):
            raise ShapeMismatch(
                f"client {update.client!r}: tensor {wrong!r} is not of the model's names and shapes"
            )
        try:
            part, norm = clipped(
                {name: a.astype(np.float64) - model[name] for name, a in update.arrays.items()}, bound
            )
        except Refused:  # not finite: it adds nothing
            return
        for name, a in part.items():
            self.delta[name] += a
        self.within += norm <= bound
        self.scores += bounded_scores(update.metrics)
        self.clients.append(update.client)


def drawn_noise(model: Arrays, sigma: float, source: Noise) -> Arrays:
    """The noise of one release in the shapes of `model`, which is measured before it is used.

    Raises PrivacyRefused when it is not of the size that was promised.
    """
    drawn = {name: sigma * source.normal(*a.shape) for name, a in model.items()}
    count = sum(a.size for a in drawn.values())
    squares = math.fsum(float(np.square(a).sum()) for a in drawn.values())
    if not as_promised(squares, count, sigma):
        raise PrivacyRefused(
            f"the noise measured {math.sqrt(squares / max(count, 1)):.4g}, {sigma:.4g} was "
            "promised; nothing was released"
        )
    return drawn


def _adapted(
    bound: float, within: int, came: int, cohort: int, privacy: ClientPrivacy, source: Noise
) -> float:
    """C exp(-rate (share of updates within C - quantile)): a clip that too many are within shrinks.

    A bit counts as its distance from 1/2, so that a client more or less changes the sum
    by 1/2, as it is charged.
    """
    if not privacy.quantile:
        return bound
    share = 0.5 + (within - 0.5 * came + privacy.bits * float(source.normal(1)[0])) / cohort
    return bound * math.exp(-privacy.rate * (min(max(share, 0.0), 1.0) - privacy.quantile))


def _metrics(sums: _Sums, cohort: int, privacy: ClientPrivacy, source: Noise) -> Metrics:
    if not privacy.metrics:
        return {}
    loss, right = np.clip(
        (sums.scores + privacy.metrics * METRIC_NORM * source.normal(2)) / cohort, 0.0, 1.0
    ).tolist()
    return scored(loss, right, float(cohort))


def _generator(source: Noise) -> np.random.Generator:
    """A numpy generator that nobody can follow without having seen what it draws."""
    words = (source.uniform(4) * 2**32).astype(np.uint32)
    return np.random.Generator(np.random.Philox(key=words.view(np.uint64)))
