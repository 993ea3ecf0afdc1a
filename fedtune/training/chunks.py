"""Which examples of which clients go through the base together: index work, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.data.encoded import ClientData
from fedtune.privacy.noise import Noise
from fedtune.tasks import base

UNEVEN = 4
"""Room for rows brought together by model, as a multiple of the rows there are."""


@dataclass(frozen=True)
class Task:
    """One client's local round: its data, which examples form which step,
    and the tensors it trains (None: all).
    """

    client: str
    data: ClientData
    batches: Sequence[np.ndarray]
    trained: frozenset[str] | None = None
    noise: Noise | None = None
    """Under example-level privacy: where this client's noise comes from."""


@dataclass(frozen=True)
class Picked:
    """n examples.

    `lengths` int64 [n]: tokens, 1 for an image. `row` int64 [n]: the model that each trains. `scale` float32
    [n]: weight of its summed loss.
    """

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
        return Picked(
            [self.keys[i] for i in places],
            [self.encoded[i] for i in places],
            self.labels[index],
            self.lengths[index],
            self.row[index],
            self.scale[index],
        )


def pick(tasks: Sequence[Task], step: int, kind: base.Task) -> Picked:
    """What all tasks see in a step; task i trains model i.

    A model's loss is the mean over the predictions of its batch.
    """
    return join([(row, task, task.batches[step]) for row, task in enumerate(tasks)], kind)


def join(parts: Sequence[tuple[int, Task, np.ndarray]], kind: base.Task) -> Picked:
    """Examples of several (model, task, places in its data)."""
    places = [index.tolist() for _, _, index in parts]
    keys = [(task.client, i) for (_, task, _), index in zip(parts, places) for i in index]
    encoded = [task.data.encoded[i] for (_, task, _), index in zip(parts, places) for i in index]
    lengths = (
        np.array([len(next(iter(e.values()))) for e in encoded], np.int64)
        if kind.inputs.has_length
        else np.ones(len(encoded), np.int64)
    )
    counts = [len(index) for index in places]
    part = np.repeat(np.arange(len(parts)), counts)
    made = np.bincount(part, kind.predictions(lengths), len(parts))
    return Picked(
        keys,
        encoded,
        np.concatenate([task.data.labels[index] for _, task, index in parts]),
        lengths,
        np.repeat(np.array([row for row, _, _ in parts], np.int64), counts),
        (1.0 / np.maximum(made, 1.0)).astype(np.float32)[part],
    )


def stretches(lengths: np.ndarray, rows: int, padded: bool) -> list[np.ndarray]:
    """Places of `lengths` in stretches of about equal sums, at most `rows` each but
    never less than one example.

    Args:
        lengths: rows of each example, ascending.
        padded: every example costs as much as the longest of its stretch;
            a stretch then ends where that would waste a tenth.
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


def balanced(part: Picked) -> list[Picked]:
    """The same examples in parts in which no model has far more rows than the mean: layers bring rows
    together by model, and make room for the most that any has.
    """
    rows = np.bincount(part.row, part.lengths)
    present = rows[rows > 0]
    if len(present) * present.max() <= UNEVEN * present.sum():
        return [part]
    heavy = (rows > 2 * present.mean())[part.row]
    return [piece for chosen in (~heavy, heavy) for piece in balanced(part.take(np.flatnonzero(chosen)))]
