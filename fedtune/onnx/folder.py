"""The folder that lets a device train with onnxruntime alone: names of its files, inputs and outputs, and its card. No torch, no onnx.

    edge.json       the card, with the sha256 of the other files; written last, so that a card means a whole folder
    step.onnx       loss and gradients from a batch and the trained values
    forward.onnx    logits from a batch and the trained values
    weights.bin     the frozen weights of both
                    and the files of the encoder (tokenizer.json, ...)
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedtune.adapters.spec import AdapterSpec
from fedtune.errors import RunError

FORMAT = "1"
CARD, STEP, FORWARD = "edge.json", "step.onnx", "forward.onnx"
LABELS, WEIGHT = "labels", "weight"
LOSS, CORRECT, COUNT, LOGITS = "loss", "correct", "count", "logits"


def gradient_of(name: str) -> str:
    """Output of the step graph with a trained tensor's gradient."""
    return f"gradient:{name}"


@dataclass(frozen=True)
class EdgeCard:
    """edge.json. `frame_sha256` as in the bundle's manifest: a device whose graphs hold another frame is refused. `files`: sha256 by name."""

    format: str
    task: str
    labels: tuple[str, ...]
    max_length: int
    spec: AdapterSpec
    base: str
    base_sha256: str
    frame_sha256: str
    opset: int
    fedtune: str
    files: dict[str, str]


CARD_FILE = TypeAdapter(EdgeCard)


def open_card(folder: Path) -> EdgeCard:
    """Reads the card and checks every file against it. Raises RunError for a folder that is not whole."""
    path = folder / CARD
    try:
        card = CARD_FILE.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{folder}: no {CARD}, so no graphs for training; make them with `fedtune prepare JOB -o BUNDLE --edge {folder}`") from None
    except (OSError, ValidationError) as e:
        first = e.errors()[0]["msg"] if isinstance(e, ValidationError) else e.strerror
        raise RunError(f"{path}: cannot be read ({first}); copy the folder again") from None
    if card.format != FORMAT:
        raise RunError(f"{path}: format {card.format}, this fedtune reads {FORMAT}; use the version that wrote it")
    for name, sha256 in card.files.items():
        if (found := sha256_of(folder / name)) != sha256:
            raise RunError(f"{folder / name}: sha256 {found[:12] or 'of nothing'}…, {CARD} says {sha256[:12]}…; copy the folder again")
    return card


def sha256_of(path: Path) -> str:
    """Hexadecimal; "" for a file that is not there."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""
