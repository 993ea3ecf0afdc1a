"""Which examples of which clients go through the base together: index work, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.training.local import ClientData


@dataclass(frozen=True)
class Task:
    """One client's local round: its data, which examples form which step, and the tensors it trains (None: all)."""

    client: str
    data: ClientData
    batches: Sequence[np.ndarray]
    trained: frozenset[str] | None = None


@dataclass(frozen=True)
class Picked:
    """n examples. `lengths` int64 [n]: tokens, 1 for an image. `row` int64 [n]: the model that each trains. `scale` float32 [n]: weight of its summed loss."""

    keys: Sequence[tuple[str, int]]
    encoded: Sequence[Mapping[str, np.ndarray]]
    labels: np.ndarray
    lengths: np.ndarray
    row: np.ndarray
    scale: np.ndarray

    def __len__(self) -> int:
        return len(self.encoded)

    def take(self, index: np.ndarray) -> "Picked":
        places = index.tolist()
        return Picked([self.keys[i] for i in places], [self.encoded[i] for i in places], self.labels[index], self.lengths[index], self.row[index], self.scale[index])


def pick(tasks: Sequence[Task], step: int, kind: str) -> Picked:
    """What all tasks see in a step; task i trains model i. A model's loss is the mean over the predictions of its batch."""
    return join([(row, task, task.batches[step]) for row, task in enumerate(tasks)], kind)


def join(parts: Sequence[tuple[int, Task, np.ndarray]], kind: str) -> Picked:
    """Examples of several (model, task, places in its data)."""
    keys, encoded, lengths, labels, rows, scales = [], [], [], [], [], []
    for row, task, index in parts:
        places = index.tolist()
        chosen = [task.data.encoded[i] for i in places]
        size = np.ones(len(chosen), np.int64) if kind == "image-classification" else np.array([len(next(iter(e.values()))) for e in chosen], np.int64)
        keys += [(task.client, i) for i in places]
        encoded += chosen
        lengths.append(size)
        labels.append(task.data.labels[index])
        rows.append(np.full(len(places), row, np.int64))
        scales.append(np.full(len(places), 1.0 / max(1, int(predictions(size, kind).sum())), np.float32))
    return Picked(keys, encoded, np.concatenate(labels), np.concatenate(lengths), np.concatenate(rows), np.concatenate(scales))


def predictions(lengths: np.ndarray, kind: str) -> np.ndarray:
    """Predictions that each example gives: one, or for a causal language model one per token after the first."""
    return np.maximum(lengths - 1, 0) if kind == "causal-lm" else np.ones_like(lengths)


def trainable_batches(data: ClientData, batches: Sequence[np.ndarray], kind: str) -> list[np.ndarray]:
    """Without those that predict nothing (one-token texts): they make no step."""
    if kind != "causal-lm":
        return list(batches)
    lengths = np.array(data.lengths)
    return [index for index in batches if predictions(lengths[index], kind).sum() > 0]


def stretches(lengths: np.ndarray, rows: int, padded: bool) -> list[np.ndarray]:
    """Places of `lengths` in stretches of about equal sums, at most `rows` each but never less than one example.

    Args:
        lengths: rows of each example, ascending.
        padded: every example costs as much as the longest of its stretch; a stretch then ends where that would waste a tenth.
    """
    if not len(lengths):
        return []
    target = lengths.sum() / max(1, -(-int(lengths.sum()) // rows))
    out, begin, total = [], 0, 0
    for i, n in enumerate(lengths.tolist()):
        cost = n * (i + 1 - begin) if padded else total + n
        wasteful = padded and cost > 1.1 * (total + n)
        if i > begin and (cost > rows or total + n / 2 > target or wasteful):
            out.append(np.arange(begin, i))
            begin, total = i, 0
        total += n
    return [*out, np.arange(begin, len(lengths))]
