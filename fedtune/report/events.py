"""TensorBoard event files: the figures of metrics.jsonl as scalars by round."""

from pathlib import Path
from typing import Any

from tensorboard.summary import Writer

TAGS = {
    "loss": "held-out/loss",
    "accuracy": "held-out/accuracy",
    "train_loss": "train/loss",
    "train_accuracy": "train/accuracy",
    "personal_accuracy": "personal/accuracy",
    "personal_loss": "personal/loss",
    "up": "bytes/up",
    "down": "bytes/down",
    "seconds": "round/seconds",
}


class Events:
    """Appends a run's rounds to event files in `folder`.

    A resumed run adds a file; TensorBoard reads them as one.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = Writer(str(folder))

    def add(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl; figures that are null are left out."""
        for key, tag in TAGS.items():
            if line.get(key) is not None:
                self._writer.add_scalar(tag, float(line[key]), line["round"])
        self._writer.add_scalar("round/clients", float(len(line["clients"])), line["round"])
        self._writer.add_scalar("round/refused", float(len(line["refused"])), line["round"])
        if "simulated_seconds" in line:
            self._writer.add_scalar("round/simulated_seconds", line["simulated_seconds"], line["round"])
            self._writer.add_scalar(
                "round/lost", float(len(line["dropped"]) + len(line["stragglers"])), line["round"]
            )
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
