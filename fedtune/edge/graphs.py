"""The graphs that `fedtune prepare --edge` made, run by onnxruntime in little memory: loss and gradients of a batch, or its logits.

What the session options below do to one step of 4 texts of 64 tokens on MiniLM with Fed-SB of rank 16 (one thread, resident memory of
a process that does nothing else): onnxruntime's own settings 250 MB; weights left where they are mapped instead of packed into copies
of their own 207 MB; without its record of each batch shape's pattern 179 MB, as a record keeps a block of its own. Its memory arena
stays on: it uses freed blocks again at once, where malloc keeps holes (262 MB) or gives them back to the system and takes twice the time.
Nodes run in the order of the file, in which the masks of ReLUs come before the next layer: nothing for MiniLM, but a step of 8 images of
128 pixels on EfficientNet-Lite0's biases takes 171 MB instead of 239.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime

from fedtune.data.images import ImageEncoder
from fedtune.data.text import TextEncoder
from fedtune.onnx.folder import CORRECT, COUNT, FORWARD, LABELS, LOGITS, LOSS, STEP, WEIGHT, WEIGHTS, EdgeCard, gradient_of, open_card
from fedtune.onnx.verify import open_session
from fedtune.types import Arrays
from fedtune.wire import Pieces

MERGERS = ("CommonSubexpressionElimination",)
"""It would turn an 8-bit weight into floats once and keep these from the forward pass to the backward one."""


class Passed(NamedTuple):
    """Of n examples: gradient of sum(weight * loss), float32 [P] in the order of the trained tensors, and float64 [3]: summed loss,
    right predictions and predictions."""

    gradient: np.ndarray
    totals: np.ndarray


@dataclass
class Graphs:
    """An opened folder. One of its two graphs is open at a time, and opened when it is asked for, so that weights are in memory once."""

    folder: Path
    card: EdgeCard
    threads: int = 0
    _name: str = ""
    _session: onnxruntime.InferenceSession | None = None

    @classmethod
    def open(cls, folder: Path, threads: int = 0) -> "Graphs":
        """`threads` 0: all cores. Raises RunError for a folder that is not whole."""
        return cls(folder, open_card(folder), threads)

    def encoder(self, max_length: int) -> TextEncoder | ImageEncoder:
        """What turns texts, cut to `max_length` tokens, or image files into inputs. Raises ModelError or DataError for a broken one."""
        if self.card.task == "image-classification":
            return ImageEncoder.from_folder(self.folder)
        return TextEncoder.from_folder(self.folder, max_length)

    def step(self, batch: Arrays, labels: np.ndarray, weight: np.ndarray, values: Mapping[str, np.ndarray]) -> Passed:
        """One pass forward and back over n examples.

        Args:
            labels: int64 [n]; weight: float32 [n].
            values: the trained tensors.
        """
        named = {} if self.card.task == "causal-lm" else {LABELS: labels}
        wanted = [LOSS, CORRECT, COUNT, *(gradient_of(t.name) for t in self.card.spec.trainable)]
        found = self.session(STEP).run(wanted, {**batch, **named, WEIGHT: weight, **values})
        totals = np.array([part.sum(dtype=np.float64) for part in found[:3]])
        return Passed(np.concatenate([gradient.ravel() for gradient in found[3:]]), totals)

    def logits(self, batch: Arrays, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 [n, classes], or [n, length, vocabulary] for a causal language model."""
        return self.session(FORWARD).run([LOGITS], {**batch, **values})[0]

    @property
    def trains(self) -> bool:
        """Whether there is a graph with gradients, beside the one for inference."""
        return STEP in self.card.files

    @property
    def weights(self) -> int:
        """Bytes of the file that both graphs map."""
        return (self.folder / WEIGHTS).stat().st_size

    def zeros(self) -> Pieces:
        """Trained tensors that are all 0."""
        schema = self.card.spec.schema
        return Pieces(np.zeros(schema.size, np.float32), schema.layout)

    def session(self, name: str) -> onnxruntime.InferenceSession:
        """Raises ModelError for a file that onnxruntime cannot open."""
        if self._session is None or self._name != name:
            self._session = None  # first, so that two are never open
            self._session, self._name = open_session(self.folder / name, lean_options(), self.threads, "copy the folder again, or use a newer onnxruntime", MERGERS), name
        return self._session


def lean_options() -> onnxruntime.SessionOptions:
    """See above."""
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that wait busily cost a shared machine more than they gain
    return options
