"""One device's own data and how it answers packets, whatever computes: torch (`training.device`) or
onnxruntime (`fedtune.edge`). No torch.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedtune.bundles.bundle import Bundle
from fedtune.common.metrics import PERSONAL
from fedtune.data import tables
from fedtune.data.clients import ClientStore, Stream
from fedtune.data.encoded import ClientData
from fedtune.data.examples import Dataset, load_dataset
from fedtune.data.partition import Split, split
from fedtune.errors import DataError, Refused
from fedtune.round.client import Learner, personal_metrics
from fedtune.stateful.methods import method_of
from fedtune.tasks import task_named
from fedtune.wire import Schema, decode, encode, require_whole

_JOB_KEY = re.compile(r"\b(data|model)\.[a-z]")
KEEP = 16 * 2**20
"""Bytes of encoded examples that a device which streams keeps."""


class Work(Learner, Protocol):
    """What computes for a device."""

    def handle(self, payload: bytes, client: str, data: Any) -> bytes:
        """Answers a packet with what training on `data`, ClientData or a Stream of them, gives.

        Raises Refused.
        """
        ...


@dataclass(frozen=True)
class Device:
    """A device that is ready to work: one client, whose split is `store.split`.

    `streams`: examples are encoded when a batch takes them, and not all at once.
    """

    bundle: Bundle
    store: ClientStore
    worker: Work
    streams: bool = False

    def facts(self) -> dict[str, Any]:
        """Training examples, held-out examples, and training examples by label name ({} without labels)."""
        names, train = self.store.dataset.label_names, self.store.split.train[0]
        counts = np.bincount(self.store.dataset.examples.labels[train], minlength=len(names)).tolist()
        return {
            "examples": len(train),
            "held_out": len(self.store.split.held_out[0]),
            "labels": dict(zip(names, counts)),
        }

    def handle(self, packet: bytes, client: str) -> bytes:
        """Answers a "model" packet with an "update", a "gradient-request" with a "gradient".

        Raises Refused.
        """
        return self.worker.handle(packet, client, self._train())

    def evaluate(self, packet: bytes) -> bytes:
        """Answers a "model" packet with "scores": that model's metrics on the held-out examples,
        whose number is the weight, and as "personal_loss" and "personal_accuracy" those of what this
        device keeps for itself.

        Raises Refused for a packet that is not for this bundle, and for a model whose loss is not a number.
        """
        model = decode(packet, self.bundle.schema, kinds=["model"], frame=self.bundle.frame_digest)
        require_whole(model)
        held_out = self._held_out()
        metrics = self.worker.metrics(method_of(self.bundle.job).shared(model.arrays), held_out)
        own = personal_metrics(self.worker, model.arrays, "", held_out, model.header.round)
        metrics = metrics | {PERSONAL + name: found for name, found in (own or {}).items()}
        if not all(math.isfinite(total) for total, _ in metrics.values()):
            raise Refused(
                "not-finite",
                f"the loss of the model of round {model.header.round} is not a number on "
                "the held-out examples here",
            )
        return encode(
            "scores",
            Schema(()),
            {},
            round=model.header.round,
            frame=self.bundle.frame_digest,
            weight=float(len(held_out)),
            metrics=metrics,
        )

    def _train(self) -> ClientData | Stream:
        # The name of the one client of the split; that in messages is the coordinator's and
        # only seeds what is drawn.
        split = self.store.split
        return self.store.stream(split.train[0], KEEP) if self.streams else self.store.train(split.clients[0])

    def _held_out(self) -> ClientData | Stream:
        split = self.store.split
        return self.store.stream(split.held_out[0]) if self.streams else self.store.held_out(split.clients[0])


def read_data(bundle: Bundle, path: Path) -> tuple[Dataset, Split]:
    """The device's examples and which of them are held out: those that a simulated client with
    the same rows holds out.

    Raises DataError of one line that begins with `--data`; EnvironmentProblem for .parquet without pyarrow.
    """
    job = bundle.job
    path = path.expanduser().absolute()  # absolute also so that no name is taken for package:NAME
    _require_kind(path, task_named(job.model.task).inputs.in_folder)
    # a device is one client: how a simulation deals rows out does not matter,
    # and the column it deals by need not be there
    data = job.data.model_copy(
        update={
            "source": str(path),
            "labels": bundle.manifest.labels,
            "partition": "iid",
            "clients": 1,
            "by": "",
        }
    )
    try:
        dataset = load_dataset(data, job.model, job.federation.seed)
        return dataset, split(dataset.examples, data, job.federation.seed)
    except DataError as e:
        raise DataError(_as_seen_here(str(e), path)) from None


def _require_kind(path: Path, images: bool) -> None:
    """Raises DataError unless there is a file (of a known kind) for a job of texts,
    a folder for one of images.
    """
    wanted = (
        "a folder of images, with one sub-folder per label"
        if images
        else f"a file of texts ({', '.join(tables.READERS)})"
    )
    try:
        exists, folder = path.exists(), path.is_dir()
    except OSError as e:
        raise DataError(
            f"--data {_line(path)}: cannot be read ({e.strerror}); check the path and its permissions"
        ) from None
    if not exists:
        raise DataError(f"--data {_line(path)}: does not exist; give {wanted}")
    if folder != images:
        raise DataError(
            f"--data {_line(path)}: is a {'folder' if folder else 'file'}; "
            f"the coordinator's job takes {wanted}"
        )
    if not images and path.suffix.lower() not in tables.READERS:
        raise DataError(f"--data {_line(path)}: suffix {path.suffix!r} is not known; give {wanted}")


def _as_seen_here(message: str, path: Path) -> str:
    """A message about data as the device's user reads it, who gave --data and cannot change the job."""
    rest = message.removeprefix(f"{path}: ")
    # an image inside, or a row of the file, says its own place
    where = "" if rest == message and message.startswith(str(path)) else f"{path}: "
    note = (
        " (keys such as data.labels are the job's, which the coordinator sets)"
        if _JOB_KEY.search(rest)
        else ""
    )
    return _line(f"--data {where}{rest}{note}")


def _line(text: object) -> str:
    return " ".join(str(text).splitlines())
