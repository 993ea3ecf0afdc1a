"""Simulated clients: which examples each holds, encoded when needed.

What is kept in memory is bounded in bytes, not by their number.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

import numpy as np

from fedtune.data.encoded import ClientData, Encoder
from fedtune.data.examples import Dataset, Examples
from fedtune.data.partition import Split
from fedtune.types import ClientInfo

CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Holders(Sequence[ClientInfo]):
    """The clients of a split as a coordinator draws them, each made when it is asked for."""

    split: Split

    def __len__(self) -> int:
        return len(self.split.clients)

    @overload
    def __getitem__(self, place: int) -> ClientInfo: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[ClientInfo, ...]: ...
    def __getitem__(self, place: int | slice) -> ClientInfo | tuple[ClientInfo, ...]:
        if isinstance(place, slice):
            return tuple(self[i] for i in range(len(self))[place])
        return ClientInfo(self.split.clients[place], len(self.split.train[place]))


@dataclass
class Stream:
    """n examples that are encoded when a batch takes them, so that the memory needed is that of a batch.

    Attributes:
        rows: places of the examples, int64 [n].
        keep: bytes of encoded examples, those taken first, that are kept for when they are taken again.
    """

    examples: Examples
    rows: np.ndarray
    encoder: Encoder
    keep: int = 0
    _kept: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)
    _bytes: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        return self.examples.labels[self.rows]

    @cached_property
    def lengths(self) -> Sequence[int]:
        """As of `ClientData`, of all n."""
        return self.encoder.lengths([self.examples.inputs[row] for row in self.rows.tolist()])

    def take(self, index: np.ndarray) -> ClientData:
        """The examples at these places, encoded, in this order."""
        rows = self.rows[index].tolist()
        fresh = [row for row in rows if row not in self._kept]
        found = (
            dict(zip(fresh, self.encoder.encode([self.examples.inputs[row] for row in fresh])))
            if fresh
            else {}
        )
        encoded = [found.get(row) or self._kept[row] for row in rows]
        for row, example in found.items():
            size = memory(example)
            if self._bytes + size <= self.keep:
                self._kept[row], self._bytes = example, self._bytes + size
        return ClientData(encoded, self.examples.labels[rows])


@dataclass
class ClientStore:
    """The split data of a simulation.

    The encoded examples of the clients that trained last are kept, up to `limit` bytes.
    """

    dataset: Dataset
    split: Split
    encoder: Encoder
    limit: int = CACHE_BYTES
    _kept: dict[str, tuple[ClientData, int]] = field(default_factory=dict)
    """Data and bytes by client, the one that was asked for longest ago first."""
    _bytes: int = 0

    @property
    def clients(self) -> Sequence[ClientInfo]:
        return Holders(self.split)

    def train(self, client: str) -> ClientData:
        """A client's training examples, in a fixed order."""
        if client in self._kept:
            self._kept[client] = self._kept.pop(client)
            return self._kept[client][0]
        data = self._encode(self.split.train[self.split.clients.place(client)])
        self._keep(client, data, sum(memory(example) for example in data.encoded))
        return data

    def held_out(self, client: str) -> ClientData:
        """A client's evaluation examples."""
        return self._encode(self.split.held_out[self.split.clients.place(client)])

    def stream(self, rows: np.ndarray, keep: int = 0) -> Stream:
        """Examples of any clients, by their places in the data set."""
        return Stream(self.dataset.examples, rows, self.encoder, keep)

    def _keep(self, client: str, data: ClientData, size: int) -> None:
        if size > self.limit:
            return
        while self._bytes + size > self.limit:
            self._bytes -= self._kept.pop(next(iter(self._kept)))[1]
        self._kept[client], self._bytes = (data, size), self._bytes + size

    def _encode(self, index: np.ndarray) -> ClientData:
        examples = self.dataset.examples
        return ClientData(
            self.encoder.encode([examples.inputs[row] for row in index.tolist()]), examples.labels[index]
        )


def memory(example: Mapping[str, np.ndarray]) -> int:
    """Bytes that an encoded example takes: of a short text, the objects take more than the numbers."""
    return sys.getsizeof(example) + sum(sys.getsizeof(array) for array in example.values())
