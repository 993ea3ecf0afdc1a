"""Evaluation on held-out data, per example, so that one forward pass serves every grouping by client."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedtune.models.base import TunableModel, summed_loss
from fedtune.models.load import Encoder
from fedtune.training.batches import by_length
from fedtune.training.local import ClientData, device_of, to_batch
from fedtune.types import Metrics


@dataclass(frozen=True)
class Scores:
    """Per example: summed loss, right predictions and predictions made, each float64 [n]."""

    loss: np.ndarray
    correct: np.ndarray
    count: np.ndarray

    def metrics(self, index: np.ndarray | slice = slice(None)) -> Metrics:
        weight = float(self.count[index].sum())
        return {"loss": (float(self.loss[index].sum()), weight), "accuracy": (float(self.correct[index].sum()), weight)}


def score(model: TunableModel, data: ClientData, encoder: Encoder, batch_size: int, progress: Callable[[int], None] | None = None) -> Scores:
    """Runs the model over all examples; order is that of `data`. `progress` is told how many examples each batch had."""
    out = np.zeros((3, len(data)))
    with torch.inference_mode():
        for index in by_length(data.lengths, batch_size) if len(data) else ():
            batch, labels = to_batch(data, index, encoder, device_of(model))
            out[:, index] = torch.stack(summed_loss(model(**batch), batch, labels, model.task)).double().cpu().numpy()
            if progress:
                progress(len(index))
    return Scores(*out)


def features(model: TunableModel, data: ClientData, encoder: Encoder, batch_size: int, progress: Callable[[int], None] | None = None) -> np.ndarray:
    """What the head sees, float32 [n, width], from the model as it is."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.inference_mode():
        for index in by_length(data.lengths, batch_size):
            parts.append((index, model.features(**to_batch(data, index, encoder, device_of(model))[0]).cpu().numpy()))
            if progress:
                progress(len(index))
    out = np.empty((len(data), parts[0][1].shape[1]), np.float32)
    for index, values in parts:
        out[index] = values
    return out


def join(parts: Sequence[ClientData]) -> ClientData:
    """Several clients' data as one."""
    return ClientData([e for p in parts for e in p.encoded], np.concatenate([p.labels for p in parts]) if parts else np.zeros(0, np.int64))
