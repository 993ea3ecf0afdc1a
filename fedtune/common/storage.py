"""Files that are whole or absent: written beside their place, synced, then renamed into it."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedtune.errors import EnvironmentProblem, UserError

PART = ".part"  # ends the name of a file that is being written
_NO_SUCH_PLACE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Puts `data` at `path` so that a crash at any instant leaves the old file or the new one, never with
    more rights than `mode`.

    Raises EnvironmentProblem when the disk is full or the folder cannot be written;
    the old file is then intact.
    """
    with failing_clearly(path):
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)  # 0600
        try:
            with os.fdopen(fd, "wb") as f:
                os.fchmod(f.fileno(), mode)
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):  # Ctrl-C can come when it has its place already
                os.unlink(name)
            raise
        sync_folder(path.parent)


def append(path: Path, data: bytes) -> None:
    """Adds `data` at the end of a file, synced.

    A crash may leave the first part of it; a full disk leaves the file as it was.

    Raises EnvironmentProblem when the disk is full or the file cannot be written.
    """
    with failing_clearly(path), path.open("ab") as file:
        before = file.tell()
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, before)
            raise


def write_json(path: Path, value: Any) -> None:
    """JSON, indented, atomic. NaN and infinity are refused: they are not JSON."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def failing_clearly(path: Path) -> Iterator[None]:
    """Turns an OSError on `path` into one line: a UserError for a path that cannot be, an
    EnvironmentProblem for the disk.
    """
    try:
        yield
    except OSError as e:
        if e.errno in _NO_SUCH_PLACE:
            raise UserError(f"cannot write {path}: {e.strerror}; choose another place") from e
        raise EnvironmentProblem(
            f"cannot write {path}: {e.strerror or e}; free space, check permissions, or choose another place"
        ) from e


def sha256_of(path: Path) -> str:
    """Of a file's bytes, hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def private_folder(path: Path) -> None:
    """Makes a folder that only its owner may enter, unless it is there. Raises as `failing_clearly`."""
    with failing_clearly(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes what was renamed into the folder, or made in it, outlast a crash."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Whether this process holds the file (made if need be) or folder until the block
    ends; another may hold it.
    """
    with failing_clearly(path):
        fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        mine = True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        # some network file systems lock no folders; what is lost is only the guard against two at once
        except OSError:
            if not path.is_dir():
                raise
        yield mine
    finally:
        os.close(fd)


def is_held(path: Path) -> bool:
    """Whether a process has the `lock` of a file. Raises OSError when the file cannot be read."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (FileNotFoundError, NotADirectoryError):
        pass
    return False
