"""Examples as a model takes them. numpy, without torch: every kind of device holds its data like this."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedtune.data.images import ImageEncoder
from fedtune.data.text import TextEncoder

Encoder = TextEncoder | ImageEncoder


@dataclass(frozen=True)
class ClientData:
    """One client's examples, encoded: model inputs by example and labels [n] (zeros for causal-lm)."""

    encoded: Sequence[Mapping[str, np.ndarray]]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.encoded)

    def take(self, index: np.ndarray) -> "ClientData":
        """The examples at these places, in this order."""
        return ClientData([self.encoded[i] for i in index], self.labels[index])

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Size of each example's first input: tokens for a text, the same for every image."""
        return [next(iter(e.values())).shape[0] for e in self.encoded]
