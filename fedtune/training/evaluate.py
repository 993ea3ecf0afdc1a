"""Evaluation on held-out data, per example, so that one forward pass serves every grouping by client."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedtune.data.clients import Stream
from fedtune.data.encoded import ClientData, Encoder
from fedtune.data.slices import Slices
from fedtune.models.base import TunableModel
from fedtune.round.batches import by_length
from fedtune.training.local import device_of, to_batch
from fedtune.types import Metrics


@dataclass(frozen=True)
class Scores:
    """Per example: summed loss, right predictions and predictions made, each float64 [n]."""

    loss: np.ndarray
    correct: np.ndarray
    count: np.ndarray

    def metrics(self, index: np.ndarray | slice = slice(None)) -> Metrics:
        weight = float(self.count[index].sum())
        return {
            "loss": (float(self.loss[index].sum()), weight),
            "accuracy": (float(self.correct[index].sum()), weight),
        }


@dataclass(frozen=True)
class ClientScores:
    """The k clients that have examples: their places, mean accuracy and loss (NaN where nothing was
    predicted), and examples. Each [k].
    """

    places: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    examples: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def ranked(self) -> np.ndarray:
        """Where clients stand in these arrays, worst accuracy first, without those that have none."""
        order = np.argsort(self.accuracy, kind="stable")
        return order[np.isfinite(self.accuracy[order])]


def by_client(scores: Scores, clients: Slices) -> ClientScores:
    """Scores per example, in the order of `clients.rows`, as means of each client."""
    places = np.flatnonzero(clients.sizes)
    ends = list(zip(clients.offsets[places].tolist(), clients.offsets[places + 1].tolist()))
    loss, correct, count = (
        np.array([of[start:end].sum() for start, end in ends])
        for of in (scores.loss, scores.correct, scores.count)
    )
    count[count == 0] = np.nan
    return ClientScores(places, correct / count, loss / count, clients.sizes[places])


def score(
    model: TunableModel,
    data: ClientData | Stream,
    encoder: Encoder,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Runs the model over all examples; order is that of `data`.

    `progress` is told how many examples each batch had.
    """
    out = np.zeros((3, len(data)))
    with torch.inference_mode():
        for index, batch, labels in _batches(model, data, encoder, batch_size):
            out[:, index] = torch.stack(model.loss(model(**batch), batch, labels)).double().cpu().numpy()
            if progress:
                progress(len(index))
    return Scores(*out)


def features(
    model: TunableModel,
    data: ClientData | Stream,
    encoder: Encoder,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """What the head sees, float32 [n, width], from the model as it is."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.inference_mode():
        for index, batch, _ in _batches(model, data, encoder, batch_size):
            parts.append((index, model.features(**batch).cpu().numpy()))
            if progress:
                progress(len(index))
    out = np.empty((len(data), parts[0][1].shape[1]), np.float32)
    for index, values in parts:
        out[index] = values
    return out


def _batches(
    model: TunableModel, data: ClientData | Stream, encoder: Encoder, batch_size: int
) -> Iterator[tuple[np.ndarray, dict[str, Tensor], Tensor]]:
    """Places, inputs and labels, batch by batch.

    The lengths of all decide the batches, so a stream has those of the data it streams.
    """
    device = device_of(model)
    for index in by_length(data.lengths, batch_size) if len(data) else ():
        yield index, *to_batch(data.take(index), np.arange(len(index)), encoder, device)
