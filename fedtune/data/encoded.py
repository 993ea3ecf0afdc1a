"""Examples as a model takes them. numpy, without torch: every kind of device holds its data like this."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fedtune.data.images import ImageEncoder
from fedtune.data.text import TextEncoder

Encoder = TextEncoder | ImageEncoder


def open_encoder(folder: Path, task: str, max_length: int) -> Encoder:
    """What a device finds beside its graphs; texts are cut to `max_length` tokens.

    Raises ModelError or DataError for a broken one.
    """
    return (
        ImageEncoder.from_folder(folder)
        if task == "image-classification"
        else TextEncoder.from_folder(folder, max_length)
    )


def made_up(
    encoder: Encoder, lengths: Sequence[int], draw: np.random.Generator
) -> list[dict[str, np.ndarray]]:
    """Encoded examples to trace, try or time a model with: texts of so many tokens from the whole
    vocabulary, or as many images of noise.
    """
    if isinstance(encoder, ImageEncoder):
        return [
            {"pixels": draw.standard_normal((3, encoder.size, encoder.size)).astype(np.float32)}
            for _ in lengths
        ]
    types = [{"token_type_ids": np.zeros(n, np.int64)} if encoder.needs_type_ids else {} for n in lengths]
    return [{"input_ids": draw.integers(0, encoder.vocabulary, n), **kind} for n, kind in zip(lengths, types)]


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
