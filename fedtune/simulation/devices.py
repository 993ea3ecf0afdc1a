"""Classes of devices in a simulated fleet: who has which, who can be drawn, who is lost,
and how long an answer takes.

Pure functions. What is drawn depends on the seed, the round and the client alone, so that order and
resuming change nothing. Sizes are in bytes, times in simulated seconds. Of a class, 0 for speed or
bandwidth means that it takes no time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from fedtune.common.seeds import generator
from fedtune.job import DeviceClass, FederationSection
from fedtune.round.batches import local_batches
from fedtune.types import ClientInfo

MB = 10**6
KILOBIT = 125
"""Bytes in 1000 bits."""


@dataclass(frozen=True)
class Span:
    """How long a device is busy with one answer: receiving, training, sending."""

    down: float
    train: float
    up: float

    @property
    def total(self) -> float:
        return self.down + self.train + self.up


def span(device: DeviceClass, down: float, examples: float, up: float) -> Span:
    """Of `down` bytes received, `examples` run forward and backward (an example counts in every
    epoch), and `up` bytes sent.
    """
    return Span(
        _at(device.down_kbps, down / KILOBIT), _at(device.speed, examples), _at(device.up_kbps, up / KILOBIT)
    )


def _at(rate: float, amount: float) -> float:
    return amount / rate if rate else 0.0


def assign(seed: int, devices: Sequence[DeviceClass], clients: int) -> np.ndarray:
    """The class of each client, as its place in `devices`: integers [clients].

    One draw for the whole population, by place, as a generator for each name would take seconds for 100,000.
    More clients leave the classes of the first ones as they are.
    """
    shares = np.cumsum([device.share for device in devices])
    return np.searchsorted(shares / shares[-1], generator(seed, "device").random(clients), side="right")


def able(devices: Sequence[DeviceClass], steps: Sequence[int | None]) -> np.ndarray:
    """Which classes have the memory for a training step of theirs, of so many bytes: booleans [classes].

    None is not known; then limits must not be given.
    """
    return np.array(
        [
            not device.memory_mb or (step is not None and device.memory_mb * MB >= step)
            for device, step in zip(devices, steps, strict=True)
        ]
    )


def available(
    seed: int, round: int, devices: Sequence[DeviceClass], classes: np.ndarray, fit: np.ndarray
) -> np.ndarray:
    """Places of the clients that can be drawn in a round, ascending: those awake,
    of classes that `fit` says can train.
    """
    chances = np.where(fit, [device.available for device in devices], 0.0)
    return np.flatnonzero(generator(seed, "available", round).random(len(classes)) < chances[classes])


def drops_out(seed: int, round: int, client: str, device: DeviceClass) -> bool:
    """Whether a client that is asked in this round never answers."""
    return device.drop_out > 0 and generator(seed, "drop-out", round, client).random() < device.drop_out


def examples_run(examples: int, settings: FederationSection, round: int, client: str) -> int:
    """How many examples a client's optimizer steps of a round see,
    from the same draws as the steps themselves.

    Lengths of texts decide which examples share a batch and not how many do,
    so nothing is read or encoded for this.
    """
    if not settings.local_steps:
        return examples * settings.local_epochs
    rng = generator(settings.seed, "local", round, client)
    batches = local_batches(
        [0] * examples, settings.batch_size, settings.local_epochs, settings.local_steps, rng
    )
    return sum(len(batch) for batch in batches)


def round_seconds(answers: Sequence[float], waited: bool, deadline: float) -> float:
    """A round lasts as long as its slowest answer, or until the deadline when it `waited` for one
    that never came in time.
    """
    return deadline if waited else max(answers, default=0.0)


@dataclass(frozen=True)
class Chosen(Sequence[ClientInfo]):
    """The clients at some places of a population, looked up when asked for:
    drawing a few of many copies nothing.
    """

    clients: Sequence[ClientInfo]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> ClientInfo: ...
    @overload
    def __getitem__(self, at: slice) -> "Chosen": ...
    def __getitem__(self, at: Any) -> Any:
        return (
            Chosen(self.clients, self.places[at])
            if isinstance(at, slice)
            else self.clients[int(self.places[at])]
        )
