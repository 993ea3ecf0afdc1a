"""Answers from an exported folder, with onnxruntime, numpy, tokenizers and Pillow:
all that a device needs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedtune.adapters.spec import ADAPTER, DESCRIPTION, AdapterSpec
from fedtune.data.encoded import Encoder, open_encoder
from fedtune.errors import ModelError, RunError, UserError
from fedtune.onnx.folder import FORWARD, LOGITS, EdgeCard, open_card, read_card
from fedtune.onnx.lean import open_lean
from fedtune.onnx.verify import open_graph
from fedtune.tasks import Task, TaskName, task_named
from fedtune.types import Arrays

CARD = "model.json"
FLOAT32, INT8, STATIC, ADAPTERS = "model.onnx", "model.int8.onnx", "model.static.onnx", "model.adapters.onnx"
OPTIONS = {FLOAT32: "", INT8: "--int8", STATIC: "--static", ADAPTERS: "--adapter"}
"""What asks for a graph on the command line."""


@dataclass(frozen=True)
class ModelCard:
    """model.json: what the graphs beside it do. `max_length` is for texts;
    `left_out` says why a graph is missing, by file name.

    `spec`, `frame_sha256`: of the adapters that ADAPTERS takes.
    """

    format: str
    task: TaskName
    labels: tuple[str, ...]
    max_length: int
    opset: int
    fedtune: str
    base: str
    base_sha256: str
    left_out: dict[str, str] = field(default_factory=dict)
    spec: AdapterSpec | None = None
    frame_sha256: str = ""


CARD_FILE = TypeAdapter(ModelCard)


@dataclass(frozen=True)
class Predictor:
    """An opened folder: the card, the encoder of its inputs, the graph,
    and what it takes beside them (an adapter's values).
    """

    card: ModelCard | EdgeCard
    encoder: Encoder
    session: onnxruntime.InferenceSession
    values: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def open(
        cls, place: Path, name: str = FLOAT32, threads: int = 0, adapter: Path | None = None
    ) -> "Predictor":
        """Opens an onnx folder, or that of a run folder.

        Args:
            name: of the graph there. adapter: for ADAPTERS.

        Raises:
            RunError: nothing exported there, not by this format, no such graph,
                or an adapter that cannot be read.
            ModelError, DataError: a broken graph, tokenizer or image encoder;
                an adapter of other tensors than the graph takes.
        """
        folder = _find(place)
        card: ModelCard = read_card(folder / CARD, CARD_FILE, "export the run again")
        path = folder / name
        if not path.is_file():
            reason = card.left_out.get(name, "")
            remedy = f"leave {OPTIONS[name]} away" if OPTIONS[name] else "export the run again"
            if name in (STATIC, ADAPTERS) and not reason:
                remedy += (
                    f", or export the run with --set export.{'static' if name == STATIC else 'adapters'}=true"
                )
            raise RunError(f"{folder}: has no {name}{f' ({reason})' if reason else ''}; {remedy}")
        encoder = open_encoder(folder, task_named(card.task).inputs, card.max_length)
        values = (
            {}
            if adapter is None or card.spec is None
            else _read_adapter(adapter, card.spec, card.frame_sha256)
        )
        return cls(card, encoder, open_graph(path, threads), values)

    @classmethod
    def adapted(cls, folder: Path, adapter: Path, threads: int = 0) -> "Predictor":
        """Opens a folder that `fedtune prepare --edge` made, with an adapter trained on its base and frame.

        Raises:
            RunError: a folder that is not whole, an adapter that cannot be read.
            ModelError: an adapter of other tensors than the graph takes.
        """
        card = open_card(folder)
        encoder = open_encoder(folder, task_named(card.task).inputs, card.max_length)
        return cls(
            card,
            encoder,
            open_lean(folder / FORWARD, card.weights, threads),
            _read_adapter(adapter, card.spec, card.frame_sha256),
        )

    @property
    def task(self) -> Task:
        return task_named(self.card.task)

    def predict(self, inputs: Sequence[str], batch_size: int = 64) -> tuple[list[str], np.ndarray]:
        """The most likely label of each text or image file, and its probability, float32 [n].

        For a causal language model the label is the most likely next token, as text.

        Raises:
            UserError: no inputs, or a text that is empty.
            DataError: an image file that cannot be read.
        """
        if not inputs:
            raise UserError(f"nothing to predict; give at least one {self.task.inputs.one}")
        for place, text in enumerate(inputs, 1):
            if not text.strip():
                raise UserError(f"input {place} is empty; remove or fill it")
        rows = [self._probabilities(inputs[i : i + batch_size]) for i in range(0, len(inputs), batch_size)]
        best = [int(label) for p in rows for label in p.argmax(1)]
        return [self._name(label) for label in best], np.concatenate([p.max(1) for p in rows])

    def _probabilities(self, inputs: Sequence[str]) -> np.ndarray:
        """float32 [n, classes], or [n, vocabulary] for the token after each text."""
        batch = self.encoder.collate(self.encoder.encode(list(inputs)))
        logits = self.session.run([LOGITS], {**batch, **self.values})[0]
        logits = self.task.last(logits, batch)
        if self.task.has_head and logits.shape[1] != len(self.card.labels):
            raise RunError(
                f"{CARD}: names {len(self.card.labels)} labels, the graph has "
                f"{logits.shape[1]}; export the run again"
            )
        raised = np.exp(logits - logits.max(1, keepdims=True))
        return raised / raised.sum(1, keepdims=True)

    def _name(self, label: int) -> str:
        return self.card.labels[label] if self.task.has_head else self.encoder.decode(label)


def _read_adapter(path: Path, spec: AdapterSpec, frame_sha256: str) -> Arrays:
    """The trained values, float32.

    `path`: adapter.safetensors, or the folder that `fedtune export` puts it in.
    """
    file = path / ADAPTER if path.is_dir() else path
    try:
        arrays = load_file(file)
    except (OSError, SafetensorError) as e:
        raise RunError(
            f"--adapter {file}: cannot be read ({str(e).splitlines()[0][:120]}); "
            "give the adapter folder of a run"
        ) from None
    found, wanted = {name: a.shape for name, a in arrays.items()}, {t.name: t.shape for t in spec.trainable}
    if found != wanted:
        other = next(iter(sorted({*found.items()} ^ {*wanted.items()})))
        raise ModelError(
            f"--adapter {file}: holds {len(found)} tensors, the graph takes {len(wanted)}, "
            f"and {other[0]} differs; give an adapter trained with these graphs"
        )
    if (description := file.with_name(DESCRIPTION)).is_file():
        frame = json.loads(description.read_bytes()).get("frame_sha256", frame_sha256)
        if frame != frame_sha256:
            raise ModelError(
                f"--adapter {file}: trained with the frame {frame[:12]}…, the graphs hold "
                f"{frame_sha256[:12]}…; give an adapter trained with these graphs"
            )
    return {name: a.astype(np.float32) for name, a in arrays.items()}


def _find(place: Path) -> Path:
    for folder in (place, place / "onnx"):
        if (folder / CARD).is_file():
            return folder
    if not place.exists():
        raise RunError(f"{place}: does not exist; give a run folder, or a copy of its onnx folder")
    if (place / "run.json").is_file():
        raise RunError(
            f"{place}: this run has no onnx folder; make it with `fedtune export "
            f"{place} --set export.onnx=true`"
        )
    raise RunError(f"{place}: no {CARD} in it; give a run folder, or a copy of its onnx folder")
