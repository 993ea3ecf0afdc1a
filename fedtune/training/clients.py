"""Simulated clients: which examples each holds, encoded when first needed."""

from dataclasses import dataclass, field

import numpy as np

from fedtune.data.examples import Dataset
from fedtune.data.partition import Split
from fedtune.models.load import Encoder
from fedtune.training.local import ClientData
from fedtune.types import ClientInfo

CACHE_BYTES = 256 * 2**20


@dataclass
class ClientStore:
    """The split data of a simulation. Encoded examples are kept up to CACHE_BYTES (texts fit, images mostly do not)."""

    dataset: Dataset
    split: Split
    encoder: Encoder
    _cache: dict[str, ClientData] = field(default_factory=dict)
    _bytes: int = 0

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        return tuple(ClientInfo(name, len(index)) for name, index in zip(self.split.clients, self.split.train))

    def train(self, client: str) -> ClientData:
        """A client's training examples, in a fixed order."""
        if client not in self._cache:
            data = self._encode(self.split.train[self._at(client)])
            size = sum(a.nbytes for e in data.encoded for a in e.values())
            if self._bytes + size > CACHE_BYTES:
                return data
            self._cache[client], self._bytes = data, self._bytes + size
        return self._cache[client]

    def held_out(self, client: str) -> ClientData:
        """A client's evaluation examples."""
        return self._encode(self.split.held_out[self._at(client)])

    def _at(self, client: str) -> int:
        return self.split.clients.index(client)

    def _encode(self, index: np.ndarray) -> ClientData:
        examples = self.dataset.examples.take(index)
        return ClientData(self.encoder.encode(examples.inputs), examples.labels)
