"""What a task is, and the loss that most have. A task is found once, by its name, and passed as an object."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedtune.types import Arrays

UNLABELLED = -1


class Targets(NamedTuple):
    """What a batch asks of its logits [*rows.shape, classes].

    `rows`: bool, [n] or [n, length]: the predictions that count (padding does not). `classes`: int64 of the
    same shape, the true class, or UNLABELLED where none is known.
    """

    rows: np.ndarray
    classes: np.ndarray


class Right(NamedTuple):
    """Of k predictions: loss, float64 [k], and whether each is right, bool [k]."""

    loss: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True)
class Inputs:
    """A kind of examples that models take. There are two, `texts.TEXTS` and `images.IMAGES`.

    Attributes:
        name: "texts" or "images".
        one: one of them as a person gives it ("text", "image file").
        given: one on the command line of `fedtune predict`.
        has_length: an example is a row of tokens, short ones are padded in a batch, and the length of a batch
            is free in a graph; otherwise all examples have one shape.
        in_folder: the data is a folder of files, and an example is the path of one; otherwise a table, and an
            example is what stands in it.
        base: a packaged base that keeps little between forward and backward; "" where none is known.
    """

    name: str
    one: str
    given: str
    has_length: bool
    in_folder: bool
    base: str = ""

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the leading axes that are free in a graph."""
        return ("batch", "length") if self.has_length else ("batch",)

    def rows(self, lengths: np.ndarray) -> np.ndarray:
        """Rows that each example takes in the base, int64 [n]: its tokens, or one.

        `lengths`: int64 [n], as `ClientData.lengths`.
        """
        return lengths if self.has_length else np.ones_like(lengths)


def cross_entropy(logits: np.ndarray, classes: np.ndarray) -> Right:
    """logits: float32 [k, classes]; classes: int64 [k]. The numpy twin of torch's."""
    if not len(classes):
        return Right(np.zeros(0), np.zeros(0, bool))
    highest = logits.max(-1, keepdims=True)
    scale = np.log(np.exp(logits - highest).sum(-1, dtype=np.float64)) + highest[:, 0]
    return Right(scale - logits[np.arange(len(classes)), classes], logits.argmax(-1) == classes)


@dataclass(frozen=True)
class Task:
    """What a model learns to do.

    A caller may make one of its own, from the functions of another: `replace(TASKS["causal-lm"], loss=...)`.
    A loss of its own needs a torch twin, which `fedtune.models.base.TunableModel` takes beside the task.

    Attributes:
        name: as `model.task` of a job has it.
        inputs: what the model takes.
        targets: from an encoded batch of n examples and their labels, int64 [n], to what is predicted. The
            torch twin of the loss is found by this function.
        predictions: from the lengths of n examples, int64 [n], to how many predictions each makes, int64 [n].
        has_head: examples have labels, and a head of ours predicts the label of each; otherwise the data has
            no labels, and the base predicts with its own output.
        loss: of k predictions, from logits, float32 [k, classes], and true classes, int64 [k].
        answer: what one prediction is ("label", "token").
        metric: a measure in words, from its name in the summary.
        scored: what the accuracy is measured on, in words.
        pipeline: the tag that model hubs give to models of this task.
        peft: the task type in PEFT's settings.
    """

    name: str
    inputs: Inputs
    targets: Callable[[Arrays, np.ndarray], Targets]
    predictions: Callable[[np.ndarray], np.ndarray]
    has_head: bool = True
    loss: Callable[[np.ndarray, np.ndarray], Right] = cross_entropy
    answer: str = "label"
    metric: str = "{}"
    scored: str = "held-out examples of all clients"
    pipeline: str = "text-classification"
    peft: str = "FEATURE_EXTRACTION"

    def scores(self, logits: np.ndarray, batch: Arrays, labels: np.ndarray) -> np.ndarray:
        """Of n examples: float64 [n, 3], summed loss, right predictions and predictions of each."""
        known, found = self._right(logits, batch, labels)
        example = np.nonzero(known)[0]
        columns = (found.loss, found.correct, np.ones(len(example)))
        return np.stack([np.bincount(example, column, len(labels)) for column in columns], 1)

    def totals(self, logits: np.ndarray, batch: Arrays, labels: np.ndarray) -> np.ndarray:
        """The same summed over all predictions, float64 [3]."""
        _, found = self._right(logits, batch, labels)
        return np.array([found.loss.sum(), found.correct.sum(), len(found.loss)], np.float64)

    def last(self, logits: np.ndarray, batch: Arrays) -> np.ndarray:
        """The logits that answer for each example, [n, classes]: those of its last prediction."""
        rows = self.targets(batch, np.zeros(len(logits), np.int64)).rows
        return logits if rows.ndim == 1 else logits[np.arange(len(logits)), rows.sum(1) - 1]

    def most_predictions(self, max_length: int) -> int:
        """The most that an example of `max_length` tokens may claim: as if it had one more."""
        return int(self.predictions(np.array([max_length + 1]))[0])

    def _right(self, logits: np.ndarray, batch: Arrays, labels: np.ndarray) -> tuple[np.ndarray, Right]:
        rows, classes = self.targets(batch, labels)
        known = rows & (classes != UNLABELLED)
        return known, self.loss(logits[known], classes[known])
