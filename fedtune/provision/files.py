"""Private files and folders: checked before anything is written, locked, read,
written whole or not at all.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtune.common.storage import PART, failing_clearly, is_held, lock, sync_folder, write_atomic
from fedtune.errors import EnvironmentProblem, UserError

_LARGEST = 64 * 1024  # bytes of a key or certificate file


@dataclass(frozen=True)
class File:
    path: Path
    data: bytes
    secret: bool


def read(path: Path) -> bytes | None:
    """None when there is no such file.

    Raises UserError for what is no file or too long, EnvironmentProblem for what cannot be read.
    """
    with _reading(path):
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise UserError(f"{path}: not a plain file; move it away")
            with path.open("rb") as file:
                data = file.read(_LARGEST + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
    if len(data) > _LARGEST:
        raise UserError(
            f"{path}: longer than {_LARGEST:,} bytes, so neither a key nor a certificate; "
            "move it away or restore it from a copy"
        )
    return data


def exists(path: Path) -> bool:
    """Unlike pathlib's, fails in one line where folders may not be looked into."""
    with _reading(path):
        return path.exists()


def is_folder(path: Path) -> bool:
    with _reading(path):
        return path.is_dir()


def listed(folder: Path) -> list[Path]:
    """What is in the folder, by name; nothing when there is no such folder.

    Raises EnvironmentProblem when it cannot be read.
    """
    with _reading(folder):
        try:
            return sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise EnvironmentProblem(f"cannot read {path}: {e.strerror or e}; check permissions") from e


def require_no_file(path: Path) -> None:
    if os.path.lexists(path) and not is_folder(path):
        raise UserError(f"{path}: not a folder; choose another place with -o")


def require_plain(root: Path, paths: Iterable[Path]) -> None:
    """Raises UserError for a link, or something that is no file or folder,
    where a file or a folder on the way to it would go.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        above = path.parents
        folders.update(dict.fromkeys(above[: above.index(root)]))
        _require_kind(path, stat.S_ISREG, "file")
    for folder in folders:
        _require_kind(folder, stat.S_ISDIR, "folder")


def _require_kind(path: Path, test: Callable[[int], bool], word: str) -> None:
    with _reading(path):
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
    if stat.S_ISLNK(mode):
        raise UserError(
            f"{path}: is a link, and keys are never written through one; remove it or choose another -o"
        )
    if not test(mode):
        raise UserError(f"{path}: not a {word}; move it away or choose another -o")


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Keeps a second call out meanwhile. Raises UserError when one is at work."""
    with lock(root) as mine:
        if not mine:
            raise UserError(f"{root}: another `fedtune provision` is at work here; wait for it")
        yield


def make_folder(path: Path) -> None:
    """Makes the folder and those above it, 0700 each; leaves what exists as it is."""
    if is_folder(path):
        return
    require_no_file(path)
    make_folder(path.parent)
    with failing_clearly(path):
        path.mkdir(0o700)
        path.chmod(0o700)  # a strict umask may have taken rights from the owner
        sync_folder(path.parent)


def write(file: File) -> None:
    """Whole or absent, and at no instant with more rights than it ends with."""
    with failing_clearly(file.path):
        for part in file.path.parent.glob(f".{file.path.name}*{PART}"):  # of a call that was killed
            part.unlink()
    write_atomic(file.path, file.data, 0o600 if file.secret else 0o644)


def require_unused(folders: Iterable[Path]) -> None:
    """Raises UserError when a running coordinator or device holds one of these folders:
    new keys would shut all of them out.
    """
    for folder in folders:
        if is_held(folder / ".lock"):
            raise UserError(
                f"{folder}: is in use by a running fedtune; stop it first, new keys "
                "would shut every device out"
            )
