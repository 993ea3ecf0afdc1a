"""How a chunk of examples goes through the base: packed (texts without padding) or padded.

Both give the same numbers.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedtune.data.encoded import Encoder
from fedtune.models.base import TunableModel
from fedtune.models.cut import Cut
from fedtune.models.losses import Scores
from fedtune.models.packed import NotPackable, PackedModel, Packing

Encoded = Sequence[Mapping[str, np.ndarray]]


class Pass(Protocol):
    """`unit`: where features are kept: the lowest trained block, "head", or None.

    `features`: what came to the cut for each example: [length, width], [channels, height, width],
    or [width] below the head.
    """

    unit: str | None
    padded: bool

    def running(self) -> AbstractContextManager[None]:
        """Inside, the other methods may be called."""
        ...

    def loss(self, encoded: Encoded, labels: np.ndarray, features: Sequence[np.ndarray] | None) -> Scores:
        """Through what lies above the cut where `features` are given, else through all."""
        ...

    def below(self, encoded: Encoded) -> list[np.ndarray]:
        """The features of each example."""
        ...

    def rows(self, lengths: np.ndarray) -> np.ndarray | None:
        """Rows that each example has in the layers of one long row;
        None where examples stand in rows of their own.
        """
        ...


class Padded:
    """Examples in a batch of their own dimension, texts padded to the longest; for any base."""

    padded = True

    def __init__(self, model: TunableModel, encoder: Encoder, unit: str | None, device: torch.device) -> None:
        self.model, self.encoder, self.unit, self.device = model, encoder, unit, device
        self._cut = Cut(model.body, unit) if unit not in (None, "head") else None

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()

    def rows(self, lengths: np.ndarray) -> None:
        return None

    def loss(self, encoded: Encoded, labels: np.ndarray, features: Sequence[np.ndarray] | None) -> Scores:
        wanted = torch.from_numpy(labels).to(self.device)
        if features is not None and self._cut is None:
            return _head_loss(self.model, features, wanted, self.device)
        batch = self._batch(encoded)
        if features is None or self._cut is None:
            return self.model.loss(self.model(**batch), batch, wanted)
        hidden = torch.from_numpy(_stack(features)).to(self.device)
        return self.model.loss(self._cut.above(hidden, lambda: self.model(**batch)), batch, wanted)

    def below(self, encoded: Encoded) -> list[np.ndarray]:
        batch = self._batch(encoded)
        with torch.no_grad():
            if self._cut is None:
                return list(self.model.features(**batch).cpu().numpy().copy())
            hidden = self._cut.below(lambda: self.model(**batch)).cpu().numpy()
        if not self.model.task.inputs.has_length:
            return [h.copy() for h in hidden]
        return [h[: len(e["input_ids"])].copy() for h, e in zip(hidden, encoded)]

    def _batch(self, encoded: Encoded) -> dict[str, Tensor]:
        batch = self.encoder.collate(encoded)
        return {k: torch.from_numpy(v).to(self.device) for k, v in batch.items()}


class Packed:
    """Texts one after another in a single row, without padding."""

    padded = False

    def __init__(self, model: TunableModel, unit: str | None, device: torch.device, first: int = 0) -> None:
        self.model, self.unit, self.device = model, unit, device
        self.packed = PackedModel(model, first)
        self._cut = Cut(model.body, unit) if unit not in (None, "head") else None

    def running(self) -> AbstractContextManager[None]:
        return self.packed.active()

    def rows(self, lengths: np.ndarray) -> np.ndarray:
        return lengths

    def loss(self, encoded: Encoded, labels: np.ndarray, features: Sequence[np.ndarray] | None) -> Scores:
        wanted = torch.from_numpy(labels).to(self.device)
        if features is not None and self._cut is None:
            return _head_loss(self.model, features, wanted, self.device)
        packing, rows = self._packed(encoded)
        if features is None or self._cut is None:
            out = self.packed.run(rows, packing)
        else:
            hidden = torch.from_numpy(np.concatenate(features)).to(self.device)
            out = self._cut.above(hidden[None], lambda: self.packed.run(rows, packing))
        if self.model.head is None:
            packed = self.model.losses.packed
            if packed is None:
                raise NotPackable("the loss of its task takes no packed texts")
            return packed(out, rows["input_ids"], packing.starts, packing.lengths)
        return self.model.loss(self.model.head(self.packed.pooled(out, packing)), {}, wanted)

    def below(self, encoded: Encoded) -> list[np.ndarray]:
        packing, rows = self._packed(encoded)
        with torch.no_grad():
            if self._cut is None:
                return list(self.packed.pooled(self.packed.run(rows, packing), packing).cpu().numpy().copy())
            hidden = self._cut.below(lambda: self.packed.run(rows, packing))[0].cpu().numpy()
        return [part.copy() for part in np.split(hidden, np.cumsum(packing.lengths)[:-1])]

    def _packed(self, encoded: Encoded) -> tuple[Packing, dict[str, Tensor]]:
        packing = Packing([len(e["input_ids"]) for e in encoded], self.device)
        return packing, {
            k: torch.from_numpy(np.concatenate([e[k] for e in encoded])).to(self.device) for k in encoded[0]
        }


def _head_loss(
    model: TunableModel, features: Sequence[np.ndarray], labels: Tensor, device: torch.device
) -> Scores:
    assert model.head is not None
    return model.loss(model.head(torch.from_numpy(np.stack(features)).to(device)), {}, labels)


def _stack(features: Sequence[np.ndarray]) -> np.ndarray:
    """Features as one array, zeros behind the shorter: the mask hides what is there."""
    longest = max(len(f) for f in features)
    if all(len(f) == longest for f in features):
        return np.stack(features)
    out = np.zeros((len(features), longest, *features[0].shape[1:]), np.float32)
    for row, f in zip(out, features):
        row[: len(f)] = f
    return out
