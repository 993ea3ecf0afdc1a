"""What clients keep from round to round, on their own disk: a file for each client and round,
and only of clients that took part.

    FOLDER/ab/0123…/00003.safetensors      what one client keeps since round 3; the folder's name is
                                           the sha256 of the client's

A file is written once and whole, and says whose it is and of which round. What a client knows after round r
is in its newest file of a round up to r, so a run that goes back to a checkpoint finds what was true then.
Files that no kept checkpoint needs any more are removed.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedtune.common.storage import private_folder, write_atomic
from fedtune.errors import RunError
from fedtune.types import Arrays
from fedtune.wire import Schema

FORMAT, KEY = "1", "fedtune"
BACK = 2
"""A run may be continued from so many rounds before the last: the checkpoints that
it keeps (`fedtune.runs.folder`).
"""
_FLOAT32 = np.dtype(np.float32)
VERSIONS = BACK + 1
"""Files that a client has at most."""
HEADER = 2**12
"""Bytes of a file beside its numbers, at most, and as much again for each tensor's name and place."""


@dataclass(frozen=True)
class Kept:
    """A folder of such files, made when the first is written; nobody but its user may enter it.

    Attributes:
        schema: the tensors that a client keeps.
        owner: the one client whose they all are, by whatever name a message calls it;
            "" where there are many.
    """

    folder: Path
    schema: Schema
    owner: str = ""

    def load(self, client: str, round: int) -> Arrays | None:
        """What the client kept after round `round`, float32; None before it first took part.

        Raises RunError for a file that is not whole or another's.
        """
        path = self._newest(self._place(client), round)
        return None if path is None else self._read(path)

    def save(self, client: str, round: int, arrays: Arrays) -> None:
        """What the client keeps since this round.

        Of later rounds, which a run that went back has not had yet, and of those long past nothing stays.
        """
        place = self._place(client)
        private_folder(self.folder)
        private_folder(place.parent)
        private_folder(place)
        write_atomic(
            place / f"{round:05d}.safetensors",
            _content(self.schema, self.owner or client, round, arrays),
            0o600,
        )
        for unfinished in place.glob(".*.part"):  # of a write that was cut off
            unfinished.unlink(missing_ok=True)
        needed = self._newest(place, round - BACK)
        for path, its in _versions(place):
            if its > round or (needed is not None and its < _round(needed)):
                path.unlink(missing_ok=True)

    def clients(self, names: Iterable[str], round: int) -> Iterator[str]:
        """Those of these clients that keep something after round `round`, in their order; by names of
        files, of which none is opened.
        """
        there = {place.parent.name + place.name for place in self.folder.glob("[0-9a-f][0-9a-f]/*")}
        return (
            name
            for name in names
            if _name(self.owner or name) in there and self._newest(self._place(name), round) is not None
        )

    def _place(self, client: str) -> Path:
        name = _name(self.owner or client)
        return self.folder / name[:2] / name[2:]

    def _newest(self, place: Path, round: int) -> Path | None:
        return max(
            ((path, its) for path, its in _versions(place) if its <= round),
            key=lambda found: found[1],
            default=(None, 0),
        )[0]

    def _read(self, path: Path) -> Arrays:
        limit = HEADER + sum(4 * t.size + HEADER for t in self.schema.tensors)
        try:
            if path.stat().st_size > limit:
                raise ValueError(f"more than {limit:,} bytes")
            with safe_open(path, "numpy") as file:
                facts = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']!r}, this fedtune reads {FORMAT}")
            if _name(facts["client"]) != path.parent.parent.name + path.parent.name or facts[
                "round"
            ] != _round(path):
                raise ValueError("it is of another client or round")
            _require(tensors, self.schema)
            return {t.name: tensors[t.name] for t in self.schema.tensors}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as e:
            why = " ".join(str(e).split())[:150]
            raise RunError(
                f"{path}: not what a client of this job keeps ({why}); restore it, or remove its folder "
                f"{path.parent}, and the client begins anew"
            ) from None


def file_bytes(schema: Schema, client: str = "device") -> int:
    """Bytes of one file of a client of this name."""
    return len(_content(schema, client, 1, {t.name: np.zeros(t.shape, np.float32) for t in schema.tensors}))


def _content(schema: Schema, client: str, round: int, arrays: Arrays) -> bytes:
    tensors = {t.name: np.ascontiguousarray(arrays[t.name], np.float32) for t in schema.tensors}
    return save(tensors, {KEY: json.dumps({"format": FORMAT, "client": client, "round": round})})


def _require(tensors: Arrays, schema: Schema) -> None:
    """Raises ValueError unless these are the tensors of the schema, finite."""
    found = {name: (a.dtype, a.shape) for name, a in tensors.items()}
    if found != {t.name: (_FLOAT32, t.shape) for t in schema.tensors}:
        raise ValueError("its tensors are not those that the job's clients keep")
    if not all(np.isfinite(a).all() for a in tensors.values()):
        raise ValueError("a number is not finite")


def _versions(place: Path) -> list[tuple[Path, int]]:
    return [(path, _round(path)) for path in place.glob("*.safetensors") if path.stem.isdecimal()]


def _round(path: Path) -> int:
    return int(path.stem)


def _name(client: str) -> str:
    return hashlib.sha256(client.encode()).hexdigest()[:32]
