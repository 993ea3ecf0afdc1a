"""Canaries of client-level privacy: clients whose update is a vector of their own, and what the model says of them after a round."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedtune.privacy.canaries import LOUD, Canaries, Directions, Sight, View
from fedtune.privacy.plan import Plan


@dataclass
class ClientCanaries:
    """Clients that answer with a vector LOUD times as long as the clip in a direction of their own, or not at all.

    The attacker modelled chooses those updates, knows all others, and sees the model after every round. It knows who was asked,
    too, unless the job's promise rests on that being secret. What is out does not answer, with two exceptions. Where a fixed number is drawn,
    neighbours are data sets with one client exchanged for another, and what is out pulls the other way. Where clients add the noise
    themselves, what is out answers with the model it was sent, as a sum needs its share of the noise.

    Attributes:
        view: what there is to see of a canary. sight: what was.
        asked: rounds of each canary that was asked.
    """

    canaries: Canaries
    directions: Directions
    plan: Plan
    view: View
    sight: Sight = field(init=False)
    asked: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sight = Sight.of(self.view, len(self.canaries))

    def __contains__(self, client: str) -> bool:
        return client in self._place

    def silent(self, client: str) -> bool:
        """Whether it is a canary that does not answer."""
        return client in self and not self.canaries.coins[self._place[client]] and not self.view.replaced and not self.plan.distributed

    def pull(self, client: str, model: np.ndarray, clip: float) -> np.ndarray:
        """The update, float32 [numbers], of a canary that was sent `model`, float32 [numbers]; within the job's largest norm."""
        number = self._place[client]
        places, values = self.directions.vectors(self.canaries.direction[[number]])
        norm = min(LOUD * clip, 0.9 * self.plan.job.federation.max_norm)
        update = model.astype(np.float32)
        update[places[0]] += values[0] * np.float32(norm if self.canaries.coins[number] else -norm if self.view.replaced else 0.0)
        return update

    def released(self, change: np.ndarray, clip: float, asked: frozenset[str]) -> None:
        """A round's new model without the one before and without what other clients added, float64 [numbers]; `asked`: these canaries were."""
        seen = self.directions.along(change * (self.plan.job.federation.cohort / clip))[self.canaries.direction]
        known = self.plan.release([], clip).sampling == "none"
        which = np.array(sorted(self._place[name] for name in asked), np.int64) if known else np.arange(len(seen))
        self.sight.add(which, seen[which])
        for name in asked:
            self.asked[name] = self.asked.get(name, 0) + 1

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.canaries.clients)}
