"""One device's work: its own data, the base that its bundle names, and a worker. What the trainer process holds in memory."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.adapters.methods import write
from fedtune.adapters.spec import describe
from fedtune.bundle import Bundle, Manifest
from fedtune.data import tables
from fedtune.data.examples import Dataset, load_dataset
from fedtune.data.partition import Split, split
from fedtune.errors import DataError, EnvironmentProblem, ModelError, Refused
from fedtune.models.base import TunableModel, layout
from fedtune.models.load import load_encoder, load_model
from fedtune.models.sources import Source, locate
from fedtune.training.clients import ClientStore
from fedtune.training.evaluate import score
from fedtune.training.worker import Worker
from fedtune.wire import Schema, decode, encode

_JOB_KEY = re.compile(r"\b(data|model)\.[a-z]")


@dataclass(frozen=True)
class Device:
    """A device that is ready to work: one client, whose split is `store.split`."""

    bundle: Bundle
    store: ClientStore
    worker: Worker

    def facts(self) -> dict[str, Any]:
        """Training examples, held-out examples, and training examples by label name ({} for causal-lm)."""
        names, train = self.store.dataset.label_names, self.store.split.train[0]
        counts = np.bincount(self.store.dataset.examples.labels[train], minlength=len(names)).tolist()
        return {"examples": len(train), "held_out": len(self.store.split.held_out[0]), "labels": dict(zip(names, counts))}

    def handle(self, packet: bytes, client: str) -> bytes:
        """Answers a "model" packet with an "update", a "gradient-request" with a "gradient". Raises Refused."""
        return self.worker.handle(packet, client, self.store.train(self._own))

    def evaluate(self, packet: bytes) -> bytes:
        """Answers a "model" packet with "scores": that model's metrics on the held-out examples, whose number is the weight.

        Raises Refused for a packet that is not for this bundle, and for a model whose loss is not a number.
        """
        worker = self.worker
        model = decode(packet, worker.spec.schema, kinds=["model"], frame=self.bundle.frame_digest)
        worker.open()
        write(worker.parameters, model.arrays)
        held_out = self.store.held_out(self._own)
        metrics = score(worker.model, held_out, worker.encoder, worker.job.evaluation.batch_size).metrics()
        if not all(math.isfinite(total) for total, _ in metrics.values()):
            raise Refused("not-finite", f"the loss of the model of round {model.header.round} is not a number on the held-out examples here")
        return encode("scores", Schema(()), {}, round=model.header.round, frame=self.bundle.frame_digest, weight=float(len(held_out)), metrics=metrics)

    @property
    def _own(self) -> str:
        """The name of the one client of the split. The name in messages is the coordinator's and only seeds what is drawn."""
        return self.store.split.clients[0]


def open_device(bundle: Bundle, data: Path, base: Path | None = None) -> Device:
    """Reads and checks the data, finds the base and checks its hash, and only then loads it, which takes the longest.

    Args:
        data: what `--data` named: a file of texts or a folder of images, as the bundle's job has it.
        base: folder of the base; without one, the source that the bundle names is looked for on this machine.

    Raises:
        DataError, ModelError, RunError: one line about the data, the base, or a bundle that is not whole.
        EnvironmentProblem: a base that would have to be downloaded and cannot be.
    """
    job, manifest = bundle.job, bundle.manifest
    dataset, parts = read_data(bundle, data)
    source = find_base(manifest, base)
    encoder = load_encoder(job.model, source)
    model = load_model(job.model, source, max(1, len(manifest.labels)), job.federation.seed)
    _require_spec(bundle, model, source)
    worker = Worker(job, manifest.spec, model, encoder, lambda: (bundle.frame, bundle.frame_digest))
    return Device(bundle, ClientStore(dataset, parts, encoder), worker)


def read_data(bundle: Bundle, path: Path) -> tuple[Dataset, Split]:
    """The device's examples and which of them are held out: those that a simulated client with the same rows holds out.

    Raises DataError of one line that begins with `--data`; EnvironmentProblem for .parquet without pyarrow.
    """
    job = bundle.job
    path = path.expanduser().absolute()  # absolute also so that no name is taken for package:NAME
    _require_kind(path, job.model.task == "image-classification")
    # a device is one client: how a simulation deals rows out does not matter, and the column it deals by need not be there
    data = job.data.model_copy(update={
        "source": str(path), "labels": bundle.manifest.labels, "partition": "iid", "clients": 1, "by": ""})
    try:
        dataset = load_dataset(data, job.model, job.federation.seed)
        return dataset, split(dataset.examples, data, job.federation.seed)
    except DataError as e:
        raise DataError(_as_seen_here(str(e), path)) from None


def find_base(manifest: Manifest, base: Path | None) -> Source:
    """The base with the weights that the bundle was made with.

    Raises:
        ModelError: not on this machine, without weights, or with weights of another sha256.
        EnvironmentProblem: a hub name that cannot be downloaded.
    """
    source = _named(manifest) if base is None else _given(base.expanduser().absolute(), manifest)
    found = source.sha256()
    if found != manifest.sha256:
        place = f"{manifest.source} in {source.folder}" if base is None else f"--base {source.folder}"
        raise ModelError(f"{place}: the weights have sha256 {found[:12]}…, the coordinator's base has {manifest.sha256[:12] or 'none'}…; give that base with --base FOLDER")
    return source


def _named(manifest: Manifest) -> Source:
    """The source that the bundle names. A folder of the coordinator's need not be here, nor a hub within reach."""
    hint = f"; this is the coordinator's base {manifest.source!r}, give a copy of it with --base FOLDER"
    if manifest.source.startswith("package:"):  # says already how it is fetched
        hint = ""
    try:
        source = locate(manifest.source)
    except ModelError as e:
        raise ModelError(f"{e}{hint}") from None
    except EnvironmentProblem as e:
        raise EnvironmentProblem(f"{e}{hint}") from None
    if not source.weights:
        raise ModelError(f"{source.folder}: holds no .safetensors weights{hint}")
    return source


def _given(folder: Path, manifest: Manifest) -> Source:
    """The folder of `--base`."""
    wanted = f"give the folder of {manifest.source!r} with its .safetensors weights"
    kind, _, name = manifest.source.partition(":")
    if kind == "package":
        wanted += f", or leave --base out and run `fedtune fetch {name}`"
    try:
        if not folder.is_dir():
            raise ModelError(f"--base {folder}: {'is a file' if folder.exists() else 'does not exist'}; {wanted}")
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"--base {folder}: holds no .safetensors weights; {wanted}")
    except OSError as e:
        raise ModelError(f"--base {folder}: cannot be read ({e.strerror}); check its permissions") from None
    return locate(str(folder))


def _require_spec(bundle: Bundle, model: TunableModel, source: Source) -> None:
    """Raises ModelError when what the bundle trains is not what its job makes of this base, so that no message can name other tensors."""
    if describe(layout(model), bundle.job.adapter) != bundle.manifest.spec:
        raise ModelError(f"{source.folder}: its layers as opened here are not those that the bundle names; use the coordinator's versions "
                         f"(transformers {bundle.manifest.versions.get('transformers', 'unknown')})")


def _require_kind(path: Path, images: bool) -> None:
    """Raises DataError unless there is a file (of a known kind) for a job of texts, a folder for one of images."""
    wanted = "a folder of images, with one sub-folder per label" if images else f"a file of texts ({', '.join(tables.READERS)})"
    try:
        exists, folder = path.exists(), path.is_dir()
    except OSError as e:
        raise DataError(f"--data {_line(path)}: cannot be read ({e.strerror}); check the path and its permissions") from None
    if not exists:
        raise DataError(f"--data {_line(path)}: does not exist; give {wanted}")
    if folder != images:
        raise DataError(f"--data {_line(path)}: is a {'folder' if folder else 'file'}; the coordinator's job takes {wanted}")
    if not images and path.suffix.lower() not in tables.READERS:
        raise DataError(f"--data {_line(path)}: suffix {path.suffix!r} is not known; give {wanted}")


def _as_seen_here(message: str, path: Path) -> str:
    """A message about data as the device's user reads it, who gave --data and cannot change the job."""
    rest = message.removeprefix(f"{path}: ")
    where = "" if rest == message and message.startswith(str(path)) else f"{path}: "  # an image inside, or a row of the file, says its own place
    note = " (keys such as data.labels are the job's, which the coordinator sets)" if _JOB_KEY.search(rest) else ""
    return _line(f"--data {where}{rest}{note}")


def _line(text: object) -> str:
    return " ".join(str(text).splitlines())
