"""Canaries inside example-level DP-SGD: examples that bring a gradient of their own,
and what the steps release of them.

A canary stands in its client's data as a copy of one of its examples with a label below 0. So it is drawn
into batches as all examples are; then, in the place of its gradient, comes a vector LOUD times as long as the
clip in a direction of its own, which is clipped and added up as all gradients are (Nasr et al. 2023,
arXiv:2302.07956, "Dirac" canaries; here spread over several numbers).

The attacker modelled is the one that the analysis of DP-SGD is about: it chooses gradients, knows all other
examples and which of them are in a batch, the batch size, the clip and the sampling rate, and sees the noisy
gradient of every step of every update that left its client. Someone who sees only the updates knows less.
What an optimizer makes of the noisy gradients adds nothing to them, so any may run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.data.clients import ClientStore
from fedtune.data.encoded import ClientData
from fedtune.privacy.canaries import LOUD, Canaries, Directions, Sight, View
from fedtune.privacy.example import ExamplePrivacy


@dataclass
class GradientCanaries:
    """A `training.private.Audit`.

    Attributes:
        sight: what was seen so far, of steps whose updates left.
        asked: rounds of each client whose updates left.
    """

    canaries: Canaries
    directions: Directions
    privacy: ExamplePrivacy
    sight: Sight = field(init=False)
    asked: dict[str, int] = field(default_factory=dict)
    _held: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """What was seen of clients whose updates have not left yet."""
    _others: dict[int, Tensor] = field(default_factory=dict)
    """What the attacker knows of the step under way: the sum of the real examples' gradients,
    cut to the clip, by row.
    """

    def __post_init__(self) -> None:
        private = self.privacy
        self.sight = Sight.of(View(private.multiplier, private.rate, private.steps), len(self.canaries))

    @property
    def evidence(self) -> np.ndarray:
        """What was seen of each canary, float64 [m]; see `privacy.audit.take_guesses`."""
        return self.sight.evidence()

    def hide(self, client: str, data: ClientData) -> ClientData:
        """A client's data with those of its canaries that are in."""
        own = self.canaries.of.get(client, np.zeros(0, np.int64))
        own = own[self.canaries.coins[own]]
        short = min(data.encoded, key=lambda e: next(iter(e.values())).size)
        return ClientData([*data.encoded, *[short] * len(own)], np.concatenate([data.labels, -1 - own]))

    def insert(
        self, rows: np.ndarray, labels: np.ndarray, real: Callable[[np.ndarray], tuple[Tensor, Any]]
    ) -> tuple[Tensor, Tensor]:
        """As `Audit` says. Canaries have scores of 0."""
        mine, others = np.flatnonzero(labels < 0), np.flatnonzero(labels >= 0)
        flat, scores = (
            torch.zeros(len(labels), self.directions.numbers),
            torch.zeros(len(labels), 3, dtype=torch.float64),
        )
        if len(others):
            found, seen = real(others)
            flat = flat.to(found.device)
            flat[torch.from_numpy(others).to(found.device)] = found
            scores[torch.from_numpy(others)] = torch.as_tensor(seen).double().cpu()
            self._know(rows[others], found)
        places, values = self.directions.vectors(self.canaries.direction[-1 - labels[mine]])
        index = (torch.from_numpy(mine)[:, None].to(flat.device), torch.from_numpy(places).to(flat.device))
        flat[index] = torch.from_numpy(LOUD * self.privacy.clip * values).to(flat.device)
        return flat, scores

    def _know(self, rows: np.ndarray, gradients: Tensor) -> None:
        bounded = gradients * (
            self.privacy.clip / gradients.norm(dim=1, keepdim=True).clamp(min=self.privacy.clip)
        )
        for row in np.unique(rows).tolist():
            own = (
                bounded[torch.from_numpy(np.flatnonzero(rows == row)).to(gradients.device)]
                .nan_to_num(0.0)
                .sum(0)
            )
            self._others[row] = self._others[row] + own if row in self._others else own

    def released(self, row: int, client: str, gradient: Tensor) -> None:
        known, own = self._others.pop(row, None), self.canaries.of.get(client)
        if own is None or not len(own):
            return
        total = gradient * self.privacy.batch
        seen = self.directions.along(
            (total if known is None else total - known).cpu().numpy() / self.privacy.clip
        )[self.canaries.direction[own]]
        self._held.setdefault(client, []).append(seen)

    def left(self, client: str, sent: bool) -> None:
        """A client's round is over: its update left, or was held back by the client's own checks, and what
        was seen inside stays there.
        """
        held = self._held.pop(client, [])
        if sent:
            self.asked[client] = self.asked.get(client, 0) + 1
            if held:
                self.sight.add(self.canaries.of[client], np.stack(held))


@dataclass
class SpikedStore(ClientStore):
    """The clients' data, with canaries in them."""

    hide: Callable[[str, ClientData], ClientData] = lambda client, data: data

    def train(self, client: str) -> ClientData:
        return self.hide(client, super().train(client))


@dataclass
class InputCanaries:
    """Real examples of the clients with a label that is wrong, as further examples; the attacker sees how
    likely the model finds it.

    It models one who can put examples in and ask the model at the start and at the end: far weaker than the
    analysis allows, so a bound from it stays far below what a broken mechanism loses.

    Attributes:
        data: the canaries, in their order.
        asked: stays empty, as nobody outside sees who was asked.
    """

    canaries: Canaries
    data: ClientData
    asked: dict[str, int] = field(default_factory=dict)
    losses: list[np.ndarray] = field(default_factory=list)

    def hide(self, client: str, data: ClientData) -> ClientData:
        own = self.canaries.of.get(client, np.zeros(0, np.int64))
        own = own[self.canaries.coins[own]]
        mine = self.data.take(own)
        return ClientData([*data.encoded, *mine.encoded], np.concatenate([data.labels, mine.labels]))

    def scored(self, losses: np.ndarray) -> None:
        """Losses of the canaries, float64 [m], under a model: first the start's, last the end's."""
        self.losses.append(losses)

    @property
    def evidence(self) -> np.ndarray:
        """How much more each was learnt than the median canary with its label, float64 [m]:
        labels as such get likelier or not.
        """
        learnt = self.losses[0] - self.losses[-1]
        for label in np.unique(self.data.labels):
            learnt[self.data.labels == label] -= np.median(learnt[self.data.labels == label])
        return learnt


def mislabelled(data: ClientData, classes: int, rng: np.random.Generator) -> ClientData:
    """The same examples, each with a label drawn from the wrong ones of `classes`, at least two."""
    return ClientData(data.encoded, (data.labels + rng.integers(1, classes, len(data))) % classes)
