"""Saves and loads the whole state of a run after a round: model, algorithm state and counters,
in one safetensors file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedtune.algorithms.base import State
from fedtune.common.storage import write_atomic
from fedtune.errors import RunError

FORMAT = "1"
KEY = "fedtune"


@dataclass(frozen=True)
class Checkpoint:
    """State after `state.round` rounds, and what the coordinator counts beside it (bytes,
    who holds the frame…).

    `unfinished`: the round's line of metrics, where the model has not been scored yet.
    """

    state: State
    counters: dict[str, Any]
    unfinished: dict[str, Any] | None = None


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes one file atomically."""
    state = checkpoint.state
    tensors = {f"model/{n}": np.asarray(a, order="C") for n, a in state.arrays.items()}
    tensors |= {f"slots/{n}": np.asarray(a, order="C") for n, a in state.slots.items()}
    facts = {"format": FORMAT, "round": state.round, "counters": checkpoint.counters}
    if checkpoint.unfinished is not None:
        facts["unfinished"] = checkpoint.unfinished
    # one key: safetensors writes several in random order
    write_atomic(path, save(tensors, {KEY: json.dumps(facts)}))


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads what `save_checkpoint` wrote. Raises RunError on anything else."""
    try:
        with safe_open(path, "numpy") as f:
            facts = json.loads((f.metadata() or {})[KEY])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
        if facts["format"] != FORMAT:
            raise RunError(
                f"{path}: checkpoint format {facts['format']}, this fedtune reads {FORMAT}; "
                "use the version that wrote it"
            )
        arrays, slots = (
            {n[len(p) :]: a for n, a in tensors.items() if n.startswith(p)} for p in ("model/", "slots/")
        )
        return Checkpoint(
            State(int(facts["round"]), arrays, slots), dict(facts["counters"]), facts.get("unfinished")
        )
    except FileNotFoundError:
        raise RunError(f"{path}: is missing; restore it or begin a new run") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise RunError(
            f"{path}: not a checkpoint of fedtune ({e}); remove it to resume from the one before"
        ) from None
