"""What the frozen part below the lowest trained unit gives for an example,
kept from round to round within a limit of bytes.
"""

import errno
import os
from collections import OrderedDict
from io import FileIO
from pathlib import Path

import numpy as np

from fedtune.common.storage import failing_clearly

Key = tuple[str, int]
"""(client, place of the example in the client's data)."""


class FeatureStore:
    """float32 arrays by example.

    In memory, the least recently used go first; on disk, what no longer fits is not kept.

    Args:
        limit: bytes; 0 keeps nothing.
        folder: keep them in a file there, removed by `close`; None keeps them in memory.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self._limit, self._bytes = limit, 0
        self._memory: OrderedDict[Key, np.ndarray] = OrderedDict()
        self._places: dict[Key, tuple[int, tuple[int, ...]]] = {}
        self._path = None if folder is None else folder / "features.tmp"
        self._file: FileIO | None = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)  # of a process that was killed

    def fits(self, size: int) -> bool:
        """Whether so many bytes could be kept at once."""
        return size <= (self._limit if self._path is None else self._limit - self._bytes)

    def get(self, key: Key) -> np.ndarray | None:
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        if key in self._places and self._file is not None:
            start, shape = self._places[key]
            self._file.seek(start)
            return np.frombuffer(self._file.read(4 * int(np.prod(shape))), np.float32).reshape(shape)
        return None

    def put(self, key: Key, value: np.ndarray) -> None:
        if self._path is None:
            self._put_in_memory(key, value)
        elif self._bytes + value.nbytes <= self._limit:
            self._append(key, value)

    def close(self) -> None:
        """Forgets everything and removes the file."""
        self._memory.clear()
        self._places.clear()
        self._bytes = 0
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
            self._file = None

    def _put_in_memory(self, key: Key, value: np.ndarray) -> None:
        if value.nbytes > self._limit:
            return
        self._memory[key] = value
        self._bytes += value.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._memory.popitem(last=False)[1].nbytes

    def _append(self, key: Key, value: np.ndarray) -> None:
        assert self._path is not None
        with failing_clearly(self._path):
            if self._file is None:
                self._file = self._path.open("w+b", buffering=0)  # unbuffered: what fails, fails here
            place, data = self._file.seek(0, 2), np.ascontiguousarray(value, np.float32).tobytes()
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._places[key] = (place, value.shape)
        self._bytes += value.nbytes
