"""The few values that travel between modules. All are frozen; arrays inside them are treated as read-only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]
"""Tensors by name. Trainable values are float32."""

Metrics = dict[str, tuple[float, float]]
"""(sum, weight) by name; divide once, at the end (`fedtune.common.metrics.value`)."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and unit of one tensor.

    A unit is what can be selected or frozen as one ("block.3", "head").

    `rank`: of a piece of a core, the lowest rank of a client that has it; 0: everybody has the tensor.
    """

    name: str
    shape: tuple[int, ...]
    unit: str
    rank: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ClientInfo:
    """A client the coordinator may draw: its name and how many training examples it says it holds."""

    name: str
    examples: int


class Work(NamedTuple):
    """What a client trains: the tensors of `units` that a client of `rank` has (0: all).

    Clients with the same receive the same packet.
    """

    units: tuple[str, ...]
    rank: int


@dataclass(frozen=True)
class Assignment:
    """What one client does in one round: train the tensors of `units` that a client of `rank` has (0:
    all), starting from the model of `round` - 1.
    """

    client: str
    round: int
    units: tuple[str, ...]
    rank: int = 0

    @property
    def work(self) -> Work:
        return Work(self.units, self.rank)


@dataclass(frozen=True)
class Update:
    """What one client returns: new values (not differences) of the tensors it trained,
    their weight, and its metrics.
    """

    client: str
    round: int
    arrays: Arrays
    weight: float
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class RoundReport:
    """What a round did: the clients averaged, the total weight, the merged training metrics,
    who was refused and why.
    """

    round: int
    clients: tuple[str, ...]
    weight: float
    metrics: Metrics
    refused: Mapping[str, str] = field(default_factory=dict)
