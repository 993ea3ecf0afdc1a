"""Canaries: who is in by the toss of a coin, in which direction each pulls,
and what a release says of it. No torch.

Those of client-level privacy stand here whole: clients whose update is a vector of their own. Those of
examples are in `training.canaries`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.linalg import hadamard

from fedtune.common.seeds import generator
from fedtune.privacy.plan import PrivacyPlan

WIDTH = 64
"""Numbers that a direction is spread over: enough that it lies in several tensors, and that no single
number's gradient drowns it.
"""
LOUD = 10.0
"""Norm of a canary over the clip: so that it is the clipping that bounds it."""
SCALES = (1.0, 0.7, 0.5, 0.35, 0.25)
"""Of the noise that was promised: what an attacker thinks there may be."""
REHEARSED, FEWEST_REHEARSED = 3 * 10**6, 200
"""About the most numbers drawn in a rehearsal, and the fewest canaries in one."""


@dataclass(frozen=True)
class Directions:
    """`count` orthonormal vectors of `numbers` numbers: rows of Hadamard matrices over blocks of
    WIDTH places drawn by chance.

    What points in one of them adds nothing to what is seen in another,
    so that canaries do not disturb each other.
    """

    numbers: int
    seed: int

    @cached_property
    def width(self) -> int:
        return min(WIDTH, 2 ** int(math.log2(max(1, self.numbers))))

    @property
    def count(self) -> int:
        return self.numbers // self.width * self.width

    @cached_property
    def places(self) -> np.ndarray:
        """int64 [blocks, width]."""
        return (
            generator(self.seed, "canary-places")
            .permutation(self.numbers)[: self.count]
            .reshape(-1, self.width)
        )

    @cached_property
    def rows(self) -> np.ndarray:
        """float32 [width, width], orthonormal."""
        return (hadamard(self.width) / math.sqrt(self.width)).astype(np.float32)

    def vectors(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places int64 [n, width] and values float32 [n, width] of the directions int64 [n];
        all other numbers are 0.
        """
        return self.places[which // self.width], self.rows[which % self.width]

    def along(self, vector: np.ndarray) -> np.ndarray:
        """Inner products of float [numbers] with every direction, float64 [count]."""
        return (vector[self.places].astype(np.float64) @ self.rows.astype(np.float64).T).ravel()


@dataclass(frozen=True)
class Canaries:
    """m canaries. Canary i belongs to clients[owner[i]], pulls in direction[i], and is in where coins[i].

    Attributes:
        owner, direction: int64 [m]; no two canaries of one client share a direction.
        coins: bool [m], from a generator of their own: nothing in the run draws from it.
    """

    clients: Sequence[str]
    owner: np.ndarray
    direction: np.ndarray
    coins: np.ndarray

    def __len__(self) -> int:
        return len(self.coins)

    @cached_property
    def of(self) -> dict[str, np.ndarray]:
        """The canaries of each client, int64."""
        order = np.argsort(self.owner, kind="stable")
        ends = np.searchsorted(self.owner[order], np.arange(len(self.clients) + 1))
        return {name: order[a:b] for name, a, b in zip(self.clients, ends[:-1], ends[1:])}


def coins(m: int, seed: int) -> np.ndarray:
    """Fair ones, bool [m]."""
    return generator(seed, "canary-coins").random(m) < 0.5


def evidence(seen: np.ndarray, multiplier: float, rate: float = 1.0, replaced: bool = False) -> np.ndarray:
    """Logarithm of how much likelier a release is with a canary in than out,
    if the noise has this multiplier.

    Args:
        seen: inner products of the released sum with canaries' directions, in units of the clip.
        rate: chance that a unit is in the sum at all.
        replaced: what is out pulls the other way, instead of not at all.
    """
    there = _ratio(seen, multiplier, rate)
    return there - _ratio(-seen, multiplier, rate) if replaced else there


@dataclass(frozen=True)
class View:
    """What an attacker is told of a mechanism: `uses` times it sees the sum in a canary's direction.

    multiplier: of the noise. rate: chance to be in the sum of a use. replaced: as in `evidence`.
    """

    multiplier: float
    rate: float
    uses: int
    replaced: bool = False


@dataclass
class Sight:
    """What was seen of m canaries so far, under each of SCALES times the noise that was promised:
    an attacker believes no promise.

    ratio: as `evidence`, summed. out: logarithm of the likelihood if all are out. Both float64 [scales, m].
    """

    view: View
    ratio: np.ndarray
    out: np.ndarray

    @classmethod
    def of(cls, view: View, m: int) -> "Sight":
        return cls(view, np.zeros((len(SCALES), m)), np.zeros((len(SCALES), m)))

    def add(self, which: np.ndarray | slice, seen: np.ndarray) -> None:
        """What one use shows of these canaries: float [n], or of several uses float [uses,
        n]; in units of the clip.
        """
        for row, scale in enumerate(SCALES):
            z = scale * self.view.multiplier
            away = _ratio(-seen, z, self.view.rate) if self.view.replaced else np.zeros(1)
            self.ratio[row, which] += np.atleast_2d(_ratio(seen, z, self.view.rate) - away).sum(0)
            self.out[row, which] += np.atleast_2d(away - seen**2 / (2 * z * z) - math.log(z)).sum(0)

    def evidence(self) -> np.ndarray:
        """float64 [m], under the noise that makes most likely what was seen,
        whoever is in: no coin is looked at.
        """
        whole = (self.out + np.logaddexp(0.0, self.ratio)).sum(1)
        return self.ratio[int(np.argmax(whole))]


def _ratio(seen: np.ndarray, z: float, rate: float) -> np.ndarray:
    """log((1 - rate) + rate N(seen; 1, z) / N(seen; 0, z))."""
    whole = (2 * np.asarray(seen, np.float64) - 1) / (2 * z * z)
    return whole if rate >= 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + whole)


def rehearse(view: View, shrink: float = 1.0, count: int = 100_000) -> tuple[np.ndarray, np.ndarray]:
    """(evidence float64 [n], coins bool [n]) of canaries that do not disturb each other,
    in a run that exists only here.

    Args:
        shrink: the noise is that part of what was promised.
        count: of canaries; fewer for a view of many uses.
    """
    n = max(FEWEST_REHEARSED, min(count, REHEARSED // view.uses))
    rng, sight = generator(0, "canary-rehearsal"), Sight.of(view, n)
    inside = rng.random(n) < 0.5
    pull = np.where(inside, 1.0, -1.0 if view.replaced else 0.0)
    for begin in range(0, view.uses, step := max(1, 2**17 // n)):
        shape = min(step, view.uses - begin), n
        sight.add(
            slice(None),
            pull * (rng.random(shape) < view.rate) + shrink * view.multiplier * rng.standard_normal(shape),
        )
    return sight.evidence(), inside


@dataclass
class ClientCanaries:
    """Clients that answer with a vector LOUD times as long as the clip in a direction of
    their own, or not at all.

    The attacker modelled chooses those updates, knows all others, and sees the model after every round. It
    knows who was asked, too, unless the job's promise rests on that being secret. What is out does not
    answer, with two exceptions. Where a fixed number is drawn, neighbours are data sets with one client
    exchanged for another, and what is out pulls the other way. Where clients add the noise themselves, what
    is out answers with the model it was sent, as a sum needs its share of the noise.

    Attributes:
        view: what there is to see of a canary. sight: what was.
        asked: rounds of each canary that was asked.
    """

    canaries: Canaries
    directions: Directions
    plan: PrivacyPlan
    view: View
    sight: Sight = field(init=False)
    asked: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sight = Sight.of(self.view, len(self.canaries))

    @property
    def evidence(self) -> np.ndarray:
        """What was seen of each canary, float64 [m]; see `privacy.audit.take_guesses`."""
        return self.sight.evidence()

    def __contains__(self, client: str) -> bool:
        return client in self._place

    def silent(self, client: str) -> bool:
        """Whether it is a canary that does not answer."""
        return (
            client in self
            and not self.canaries.coins[self._place[client]]
            and not self.view.replaced
            and not self.plan.distributed
        )

    def pull(self, client: str, model: np.ndarray, clip: float) -> np.ndarray:
        """The update, float32 [numbers], of a canary that was sent `model`, float32 [numbers];
        within the job's largest norm.
        """
        number = self._place[client]
        places, values = self.directions.vectors(self.canaries.direction[[number]])
        norm = min(LOUD * clip, 0.9 * self.plan.job.federation.max_norm)
        update = model.astype(np.float32)
        update[places[0]] += values[0] * np.float32(
            norm if self.canaries.coins[number] else -norm if self.view.replaced else 0.0
        )
        return update

    def released(self, change: np.ndarray, clip: float, asked: frozenset[str]) -> None:
        """A round's new model without the one before and without what other clients added, float64
        [numbers]; `asked`: these canaries were.
        """
        seen = self.directions.along(change * (self.plan.job.federation.cohort / clip))[
            self.canaries.direction
        ]
        known = self.plan.release([], clip).sampling == "none"
        which = (
            np.array(sorted(self._place[name] for name in asked), np.int64) if known else np.arange(len(seen))
        )
        self.sight.add(which, seen[which])
        for name in asked:
            self.asked[name] = self.asked.get(name, 0) + 1

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.canaries.clients)}
