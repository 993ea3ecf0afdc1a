"""Many clients in few objects: whose rows are where as one array with offsets,
and names that are made when asked for.

A tuple of 100,000 small arrays costs about 15 MB and a second to make;
here a client's rows are a view, made on the way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np


@dataclass(frozen=True, eq=False)
class Slices(Sequence[np.ndarray]):
    """One int64 array a client, as views of one array.

    Attributes:
        rows: int64 [n], ordered by client.
        offsets: int64 [clients + 1]; client i has rows[offsets[i]:offsets[i + 1]].
    """

    rows: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[np.ndarray]) -> "Slices":
        """The same from one array a client."""
        sizes = [len(part) for part in parts]
        rows = np.concatenate(parts) if len(parts) else np.zeros(0)
        return cls(rows.astype(np.int64), np.concatenate(([0], np.cumsum(sizes, dtype=np.int64))))

    @classmethod
    def by_owner(cls, rows: np.ndarray, owner: np.ndarray, clients: int) -> "Slices":
        """`rows` [n] to the clients that `owner` [n] names by place; a client's rows keep their order."""
        sizes = np.bincount(owner, minlength=clients)
        return cls(
            rows[np.argsort(owner, kind="stable")].astype(np.int64), np.concatenate(([0], np.cumsum(sizes)))
        )

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each client, int64 [clients]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, place: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, place: slice) -> "tuple[np.ndarray, ...]": ...
    def __getitem__(self, place: int | slice) -> "np.ndarray | tuple[np.ndarray, ...]":
        if isinstance(place, slice):
            return tuple(self[i] for i in range(len(self))[place])
        place = range(len(self))[place]
        return self.rows[self.offsets[place] : self.offsets[place + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[place] for place in range(len(self)))


@dataclass(frozen=True, eq=False)
class Names(Sequence[str]):
    """Names of clients: the stems alone for each = 0, otherwise each stem with -000,
    -001… behind it, `each` times.

    Attributes:
        stems: distinct.
        digits: least width of the numbers.
    """

    stems: tuple[str, ...]
    each: int = 0
    digits: int = 2

    def place(self, name: str) -> int:
        """Where a name stands, without a search. Raises KeyError for one that is not there."""
        stem, _, number = name.rpartition("-") if self.each else (name, "", "0")
        place = self._places[stem] * max(1, self.each) + (
            int(number) if number.isdecimal() and len(number) < 19 else -1
        )
        if not 0 <= place < len(self) or self[place] != name:
            raise KeyError(name)
        return place

    @cached_property
    def _places(self) -> dict[str, int]:
        return {stem: place for place, stem in enumerate(self.stems)}

    def __len__(self) -> int:
        return len(self.stems) * max(1, self.each)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        if isinstance(place, slice):
            return tuple(self[i] for i in range(len(self))[place])
        place = range(len(self))[place]
        if not self.each:
            return self.stems[place]
        stem, part = divmod(place, self.each)
        return f"{self.stems[stem]}-{part:0{max(self.digits, len(str(self.each - 1)))}d}"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Names | tuple)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other))
        )

    def __hash__(self) -> int:
        return hash((self.stems, self.each, self.digits))
