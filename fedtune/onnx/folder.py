"""The folder that lets a device train with onnxruntime alone: names of its files, inputs and outputs, and its
card. No torch, no onnx.

edge.json       the card, with the sha256 of the other files; written last,
                so that a card means a whole folder
step.onnx       loss and gradients from a batch and the trained values;
                not for a job that trains with forward passes alone
step-BLOCK.onnx the same loss, and the gradients of what is trained in this block and above alone: of each
                block above the first, where the job has clients train some blocks. They save time and
                memory, and change no number
forward.onnx    logits from a batch and the trained values
weights.bin     the frozen weights of them all
                and the files of the encoder (tokenizer.json, ...)
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedtune.adapters.spec import AdapterSpec
from fedtune.common.storage import sha256_of
from fedtune.errors import RunError

FORMAT = "1"
CARD, STEP, FORWARD, WEIGHTS = "edge.json", "step.onnx", "forward.onnx", "weights.bin"
LABELS, WEIGHT = "labels", "weight"
LOSS, CORRECT, COUNT, LOGITS = "loss", "correct", "count", "logits"


def gradient_of(name: str) -> str:
    """Output of the step graph with a trained tensor's gradient."""
    return f"gradient:{name}"


def step_from(block: str) -> str:
    """File of the step whose gradients end at this block."""
    return f"step-{block}.onnx"


@dataclass(frozen=True)
class EdgeCard:
    """edge.json. `frame_sha256` as in the bundle's manifest: a device whose graphs hold another frame is
    refused. `files`: sha256 by name. `weights`: float32, or int8 for frozen ones of 8 bits.
    """

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
    pooling: str = "mean"
    weights: str = "float32"

    @property
    def mode(self) -> str:
        """As `edge.mode` of the jobs that these graphs are for."""
        return "backward" if STEP in self.files else "forward"

    @property
    def cuts(self) -> tuple[str, ...]:
        """Blocks at which a step's gradients can end, from the bottom up, besides the step of all."""
        return tuple(block for block in self.spec.schema.blocks if step_from(block) in self.files)

    def step_of(self, names: Collection[str] | None) -> str:
        """File of the smallest step that has the gradients of these trained tensors (None: of all)."""
        schema = self.spec.schema
        units = {t.unit for t in schema.tensors if names is None or t.name in names}
        if "outside" in units:  # may lie below all blocks
            return STEP
        lowest = next(
            (place for place, block in enumerate(schema.blocks) if block in units), len(schema.blocks)
        )
        found = [block for block in schema.blocks[: lowest + 1] if step_from(block) in self.files]
        return step_from(found[-1]) if found else STEP


CARD_FILE = TypeAdapter(EdgeCard)


def open_card(folder: Path) -> EdgeCard:
    """Reads the card and checks every file against it. Raises RunError for a folder that is not whole."""
    path = folder / CARD
    if not path.exists():
        raise RunError(
            f"{folder}: no {CARD}, so no graphs for training; make them with `fedtune prepare JOB "
            f"-o BUNDLE --edge {folder}`"
        )
    card: EdgeCard = read_card(path, CARD_FILE, "copy the folder again")
    for file, sha256 in ((folder / name, sha256) for name, sha256 in card.files.items()):
        if not file.is_file():
            raise RunError(f"{file}: is not there, and {CARD} names it; copy the folder again")
        if (found := sha256_of(file)) != sha256:
            raise RunError(f"{file}: sha256 {found[:12]}…, {CARD} says {sha256[:12]}…; copy the folder again")
    return card


def read_card(path: Path, kind: TypeAdapter[Any], remedy: str) -> Any:
    """A card of `kind`, which has a `format`.

    Raises RunError for one that cannot be read, which ends with the remedy, or is of another format.
    """
    try:
        card = kind.validate_json(path.read_bytes())
    except (OSError, ValidationError) as e:
        first = e.errors()[0]["msg"] if isinstance(e, ValidationError) else e.strerror
        raise RunError(f"{path}: cannot be read ({first}); {remedy}") from None
    if card.format != FORMAT:
        raise RunError(
            f"{path}: format {card.format}, this fedtune reads {FORMAT}; use the version that wrote it"
        )
    return card
