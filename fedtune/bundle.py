"""The bundle: an immutable folder made once from a job and a base. What devices receive; no code, no base weights.

    manifest.json       what the base is (source, sha256), the task, the labels, what is trained, the frame's hash, versions
    frame.safetensors   the frozen A and B (Fed-SB); absent for methods without a frame

The frame's digest is sent with every packet; a client that holds another frame is refused.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedtune.adapters.spec import AdapterSpec
from fedtune.errors import RunError
from fedtune.storage import write_atomic, write_json
from fedtune.trees import digest
from fedtune.types import Arrays

FORMAT = "1"


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
    frame_sha256: str
    versions: dict[str, str]


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. The frame is read, and its hash checked, when first asked for."""

    folder: Path
    manifest: Manifest

    @property
    def frame_digest(self) -> str:
        """First 16 digits of the frame's sha256, as packets carry it."""
        return self.manifest.frame_sha256[:16]

    @property
    def frame_bytes(self) -> int:
        """Size of the frame as shipped to a client."""
        path = self.folder / "frame.safetensors"
        return path.stat().st_size if path.exists() else 0

    @cached_property
    def frame(self) -> Arrays:
        path = self.folder / "frame.safetensors"
        try:
            arrays = load_file(path) if path.exists() else {}
        except (OSError, SafetensorError) as e:
            raise RunError(f"{path}: not a frame ({e}); remove {self.folder}, and resuming the run makes it again") from None
        if digest(arrays) != self.manifest.frame_sha256:
            raise RunError(f"{path}: sha256 {digest(arrays)[:12]}…, the manifest says {self.manifest.frame_sha256[:12]}…; remove {self.folder}, and resuming the run makes it again")
        return arrays


def write_bundle(folder: Path, frame: Arrays, **facts: Any) -> Bundle:
    """Writes frame and manifest (last, so that a manifest means a whole bundle) and opens them."""
    folder.mkdir(parents=True, exist_ok=True)
    if frame:
        write_atomic(folder / "frame.safetensors", save(frame))
    manifest = Manifest(format=FORMAT, frame_sha256=digest(frame), **facts)
    write_json(folder / "manifest.json", _MANIFEST.dump_python(manifest, mode="json"))
    return Bundle(folder, manifest)


def open_bundle(folder: Path) -> Bundle:
    """Raises RunError when the folder holds no whole bundle of this format."""
    path = folder / "manifest.json"
    try:
        manifest = _MANIFEST.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{folder}: no manifest.json, so not a bundle") from None
    except ValidationError as e:
        raise RunError(f"{path}: {e.error_count()} fields are wrong, first {e.errors()[0]['loc']}; remove {folder}, and resuming the run makes it again") from None
    if manifest.format != FORMAT:
        raise RunError(f"{path}: bundle format {manifest.format}, this fedtune reads {FORMAT}")
    return Bundle(folder, manifest)
