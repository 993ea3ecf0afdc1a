"""The graphs that `fedtune prepare --edge` made, run by onnxruntime in little memory: loss and gradients
of a batch, or its logits.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime

from fedtune.data.encoded import Encoder, open_encoder
from fedtune.onnx.folder import (
    CORRECT,
    COUNT,
    FORWARD,
    LABELS,
    LOGITS,
    LOSS,
    STEP,
    WEIGHT,
    WEIGHTS,
    EdgeCard,
    gradient_of,
    open_card,
)
from fedtune.onnx.lean import open_lean
from fedtune.tasks import Task, task_named
from fedtune.types import Arrays
from fedtune.wire import Pieces


class Passed(NamedTuple):
    """Of n examples: gradient of sum(weight * loss), float32 [P] in the order of the trained tensors, and
    float64 [3]: summed loss, right predictions and predictions.
    """

    gradient: np.ndarray
    totals: np.ndarray


@dataclass
class Graphs:
    """An opened folder.

    One of its graphs is open at a time, and opened when it is asked for, so that weights are in memory once.
    """

    folder: Path
    card: EdgeCard
    threads: int = 0
    _name: str = ""
    _session: onnxruntime.InferenceSession | None = None

    @classmethod
    def open(cls, folder: Path, threads: int = 0) -> "Graphs":
        """`threads` 0: all cores. Raises RunError for a folder that is not whole."""
        return cls(folder, open_card(folder), threads)

    @property
    def task(self) -> Task:
        return task_named(self.card.task)

    def encoder(self, max_length: int) -> Encoder:
        """What turns texts, cut to `max_length` tokens, or image files into inputs.

        Raises ModelError or DataError for a broken one.
        """
        return open_encoder(self.folder, self.task.inputs, max_length)

    def step(
        self,
        batch: Arrays,
        labels: np.ndarray,
        weight: np.ndarray,
        values: Mapping[str, np.ndarray],
        names: Collection[str] | None = None,
    ) -> Passed:
        """One pass forward and back over n examples.

        Args:
            labels: int64 [n]; weight: float32 [n].
            values: the trained tensors.
            names: those whose gradients are wanted (None: all); the gradient is 0 for the others.
        """
        named = {LABELS: labels} if self.task.has_head else {}
        tensors = self.card.spec.trainable
        wanted = [t.name for t in tensors if names is None or t.name in names]
        found = self.session(self.card.step_of(names)).run(
            [LOSS, CORRECT, COUNT, *map(gradient_of, wanted)], {**batch, **named, WEIGHT: weight, **values}
        )
        totals, gradients = (
            np.array([part.sum(dtype=np.float64) for part in found[:3]]),
            dict(zip(wanted, found[3:])),
        )
        return Passed(
            np.concatenate(
                [
                    gradients[t.name].ravel() if t.name in gradients else np.zeros(t.size, np.float32)
                    for t in tensors
                ]
            ),
            totals,
        )

    def logits(self, batch: Arrays, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 [n, classes], or [n, length, vocabulary] for a causal language model."""
        return self.session(FORWARD).run([LOGITS], {**batch, **values})[0]

    def warm(self) -> None:
        """Opens the graph that training all tensors uses."""
        self.session(STEP if self.card.mode == "backward" else FORWARD)

    @property
    def weights(self) -> int:
        """Bytes of the file that all graphs map."""
        return (self.folder / WEIGHTS).stat().st_size

    def zeros(self) -> Pieces:
        """Trained tensors that are all 0."""
        schema = self.card.spec.schema
        return Pieces(np.zeros(schema.size, np.float32), schema.layout)

    def session(self, name: str) -> onnxruntime.InferenceSession:
        """Raises ModelError for a file that onnxruntime cannot open."""
        if self._session is None or self._name != name:
            self._session = None  # first, so that two are never open
            self._session, self._name = open_lean(self.folder / name, self.card.weights, self.threads), name
        return self._session
