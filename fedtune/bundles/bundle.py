"""The bundle: an immutable folder made once from a job and a base.

What devices receive; no code, no base weights.

    manifest.json         what the base is (source, sha256), the task, the labels, what is trained, the
                          others' hashes, versions
    job.toml              the job, every key
    frame.safetensors     the frozen A and B (Fed-SB); absent for methods without a frame
    initial.safetensors   the trained tensors before round 1; stays with the coordinator, unless devices train
                          with forward passes alone, or keep a part of them to themselves

A bundle is named by the sha256 of its manifest, which holds the hashes of the rest. The frame's digest is
sent with every packet; a client that holds another frame is refused.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save

from fedtune.adapters.ranks import Ranks, ranks_in
from fedtune.adapters.spec import AdapterSpec
from fedtune.bundles.subspace import NAME, Subspace, subspace_of, travelling
from fedtune.common.storage import write_atomic, write_json
from fedtune.common.trees import digest
from fedtune.errors import FedtuneError, Refused, RunError
from fedtune.job import Job, load_job, parse_job, to_toml
from fedtune.types import Arrays
from fedtune.wire import Schema

FORMAT = "1"
SHIPPED = ("manifest.json", "job.toml", "frame.safetensors", "initial.safetensors")
"""The files a device may receive, the manifest first; `shipped_of` says which of a job."""


@dataclass(frozen=True)
class Manifest:
    """The facts of a bundle; plain data, checked when read."""

    format: str
    source: str
    sha256: str
    licence: str
    parameters: int
    task: str
    labels: tuple[str, ...]
    spec: AdapterSpec
    job_sha256: str
    frame_sha256: str
    initial_sha256: str
    versions: dict[str, str]
    weights: dict[str, float] = field(default_factory=dict)
    """|w|^2 of the base's own parameters in each block, for a job that goes by it."""


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. The frame is read, and its hash checked, when first asked for."""

    folder: Path
    manifest: Manifest

    @cached_property
    def digest(self) -> str:
        """sha256 of the manifest: the name of the bundle."""
        return hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()

    @property
    def frame_digest(self) -> str:
        """First 16 digits of the frame's sha256, as packets carry it."""
        return self.manifest.frame_sha256[:16]

    @property
    def frame_bytes(self) -> int:
        """Size of the tensors that are shipped to a client once."""
        return sum(p.stat().st_size for p in self._shipped() if p.suffix == ".safetensors")

    @cached_property
    def schema(self) -> Schema:
        """What models and updates hold."""
        return travelling(self.job, self.manifest.spec)

    @cached_property
    def subspace(self) -> Subspace | None:
        """Of a job that trains with forward passes alone."""
        return (
            subspace_of(self.job, self.manifest.spec, self.initial)
            if self.job.edge.mode == "forward"
            else None
        )

    @cached_property
    def ranks(self) -> Ranks | None:
        """Of a job whose clients have unequal ones."""
        return ranks_in(self.job, self.manifest.spec)

    @property
    def start(self) -> Arrays:
        """The model of round 0, of `schema`."""
        if self.schema == self.manifest.spec.schema:
            return self.initial
        if self.ranks is not None:
            return self.ranks.split(self.initial)
        found = self.initial if self.subspace is None else {}
        return {
            t.name: found[t.name] if t.name in found else np.zeros(t.shape, np.float32)
            for t in self.schema.tensors
        }

    def trained(self, model: Arrays) -> Arrays:
        """The trained tensors of a model of `schema`; what stays on the clients is as at the start,
        unless the model has it.
        """
        if self.subspace is not None:
            return self.subspace.expand(model[NAME])
        if self.ranks is not None:
            return self.ranks.join(model)
        if self.schema == self.manifest.spec.schema:
            return model
        return {
            t.name: model[t.name] if t.name in model else self.initial[t.name]
            for t in self.manifest.spec.trainable
        }

    @cached_property
    def job(self) -> Job:
        path = self.folder / "job.toml"
        self._require(
            path,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "",
            self.manifest.job_sha256,
        )
        return load_job(path)

    @cached_property
    def frame(self) -> Arrays:
        return self._arrays("frame.safetensors", self.manifest.frame_sha256)

    @cached_property
    def initial(self) -> Arrays:
        return self._arrays("initial.safetensors", self.manifest.initial_sha256)

    def shipped(self) -> dict[str, bytes]:
        """What a device receives, by file name."""
        return {path.name: path.read_bytes() for path in self._shipped()}

    def _shipped(self) -> list[Path]:
        return [path for name in shipped_of(self.job) if (path := self.folder / name).exists()]

    def _arrays(self, name: str, sha256: str) -> Arrays:
        path = self.folder / name
        try:
            arrays = load_file(path) if path.exists() else {}
        except (OSError, SafetensorError) as e:
            raise RunError(f"{path}: cannot be read ({e}); {self._remedy}") from None
        self._require(path, digest(arrays), sha256)
        return arrays

    def _require(self, path: Path, found: str, expected: str) -> None:
        if found != expected:
            raise RunError(
                f"{path}: sha256 {found[:12] or 'of nothing'}…, the manifest says "
                f"{expected[:12]}…; {self._remedy}"
            )

    @property
    def _remedy(self) -> str:
        return f"remove {self.folder}, and it is made again"


def shipped_of(job: Job) -> tuple[str, ...]:
    """The files that devices receive: the start only where they train with forward passes alone, or begin
    with a head that nobody sends.
    """
    return SHIPPED if job.edge.mode == "forward" or job.personal.method == "head" else SHIPPED[:-1]


def write_bundle(folder: Path, job: Job, frame: Arrays, initial: Arrays, **facts: Any) -> Bundle:
    """Writes the parts, the manifest last, so that a manifest means a whole bundle, and opens them."""
    folder.mkdir(parents=True, exist_ok=True)
    text = to_toml(job).encode()
    write_atomic(folder / "job.toml", text)
    for name, arrays in (("frame", frame), ("initial", initial)):
        if arrays:
            write_atomic(folder / f"{name}.safetensors", save(arrays))
    manifest = Manifest(
        format=FORMAT,
        job_sha256=hashlib.sha256(text).hexdigest(),
        frame_sha256=digest(frame),
        initial_sha256=digest(initial),
        **facts,
    )
    write_json(folder / "manifest.json", _MANIFEST.dump_python(manifest, mode="json"))
    return Bundle(folder, manifest)


def receive_bundle(folder: Path, name: str, files: Mapping[str, bytes]) -> Bundle:
    """Writes a bundle that came from outside, after checking that it is whole and is the one
    called `name` (its sha256).

    Raises Refused for anything else; nothing is written then.
    """
    if not files.keys() <= set(SHIPPED) or not files.keys() >= {"manifest.json", "job.toml"}:
        raise Refused(
            "bundle", f"holds {', '.join(map(repr, sorted(files)))[:200]}; {', '.join(SHIPPED)} are taken"
        )
    if hashlib.sha256(files["manifest.json"]).hexdigest() != name:
        raise Refused("bundle", f"its manifest is not the one called {name[:12]}…")
    try:
        manifest = _MANIFEST.validate_json(files["manifest.json"])
        parts = shipped_of(parse_job(files["job.toml"].decode()))
        tensors = {
            name: load(files[name]) if name in files else {}
            for name in parts
            if name.endswith(".safetensors")
        }
    except (FedtuneError, ValueError, SafetensorError) as e:
        raise Refused("bundle", f"cannot be read by this fedtune: {str(e).splitlines()[0]}"[:300]) from None
    named = {"frame.safetensors": manifest.frame_sha256, "initial.safetensors": manifest.initial_sha256}
    if (manifest.format, manifest.job_sha256) != (
        FORMAT,
        hashlib.sha256(files["job.toml"]).hexdigest(),
    ) or any(digest(t) != named[n] for n, t in tensors.items()):
        raise Refused("bundle", "its format is another, or its parts are not those that the manifest names")
    folder.mkdir(parents=True, exist_ok=True)
    for part in reversed(parts):
        if part in files:
            write_atomic(folder / part, files[part])
    return Bundle(folder, manifest)


def open_bundle(folder: Path) -> Bundle:
    """Raises RunError when the folder holds no whole bundle of this format."""
    path = folder / "manifest.json"
    try:
        manifest = _MANIFEST.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RunError(
            f"{folder}: no manifest.json, so not a bundle; `fedtune prepare JOB -o BUNDLE` makes one"
        ) from None
    except ValidationError as e:
        raise RunError(
            f"{path}: {e.error_count()} fields are wrong, first {e.errors()[0]['loc']}; "
            f"remove {folder}, and it is made again"
        ) from None
    if manifest.format != FORMAT:
        raise RunError(f"{path}: bundle format {manifest.format}, this fedtune reads {FORMAT}")
    return Bundle(folder, manifest)
