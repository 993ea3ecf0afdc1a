"""Examples as a model takes them. numpy, without torch: every kind of device holds its data like this."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedtune.data.images import ImageEncoder
from fedtune.data.text import TextEncoder
from fedtune.tasks.base import Inputs
from fedtune.tasks.images import IMAGES
from fedtune.tasks.texts import TEXTS


class Encoder(Protocol):
    """What makes a model's inputs of examples: `TextEncoder` or `ImageEncoder`."""

    def encode(self, inputs: Sequence[str], /) -> list[dict[str, np.ndarray]]:
        """The arrays of each text, or of the image at each path. Raises DataError for a broken image."""
        ...

    def lengths(self, inputs: Sequence[str], /) -> list[int]:
        """What orders examples into batches of about equal length, without encoding them."""
        ...

    def collate(self, encoded: Sequence[Mapping[str, np.ndarray]], /) -> dict[str, np.ndarray]:
        """A batch: arrays [n, ...], shorter examples padded. Raises ContractError for no examples."""
        ...

    def made_up(self, lengths: Sequence[int], draw: np.random.Generator, /) -> list[dict[str, np.ndarray]]:
        """Encoded examples to trace, try or time a model with, one for each length."""
        ...

    def sides(self, lengths: Sequence[int], /) -> Sequence[int]:
        """Of encoded examples with these `ClientData.lengths`: tokens of a text, rows of pixels of an
        image.
        """
        ...

    def span(self, tokens: int, images: int, /) -> int:
        """So many tokens of texts, or the rows of pixels of so many images: in the unit of `sides`."""
        ...

    def decode(self, place: int, /) -> str:
        """The token of this id, as text. Raises ContractError where there are none."""
        ...

    def to_config(self) -> dict[str, Any]:
        """Its settings as plain values."""
        ...

    def save(self, folder: Path, /) -> None:
        """Writes what `open_encoder` reads."""
        ...


_OPENED: Mapping[Inputs, Callable[[Path, int], Encoder]] = {
    TEXTS: TextEncoder.from_folder,
    IMAGES: lambda folder, _: ImageEncoder.from_folder(folder),
}


def open_encoder(folder: Path, inputs: Inputs, max_length: int) -> Encoder:
    """What a device finds beside its graphs; texts are cut to `max_length` tokens.

    Raises ModelError or DataError for a broken one.
    """
    return _OPENED[inputs](folder, max_length)


@dataclass(frozen=True)
class ClientData:
    """One client's examples, encoded: model inputs by example and labels [n] (zeros without labels)."""

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
