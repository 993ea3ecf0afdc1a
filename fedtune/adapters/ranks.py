"""Unequal ranks: a client of rank k trains the leading k x k block of each core of Fed-SB,
with A[:k] and B[:, :k]. NumPy only.

What it computes with, B[:, :k] R_k A[:k], is B R A with R_k in the corner of R and 0 elsewhere. A core
travels as pieces: R[:r1, :r1] of the lowest rank of the job, and for each next rank r the ring of r^2 - q^2
numbers of R[:r, :r] outside R[:q, :q], q the rank before, row by row. A client has a piece whole or not at
all, so the mean of each piece over those that sent it is the mean of each number over its owners. With R
restricted to one piece, B (mean R) A is its owners' mean of B R A, exactly, as of whole cores where all ranks
are equal; over all pieces together it is no mean of the clients' products, as each piece has other owners.

Frames are ordered by singular value, so a smaller block is the better part;
of init = "random" all parts are alike.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise

import numpy as np

from fedtune.adapters.spec import AdapterSpec
from fedtune.errors import Refused
from fedtune.job import Job
from fedtune.types import Arrays, TensorSpec
from fedtune.wire import Packet, Schema


def ranks_of(job: Job) -> tuple[int, ...]:
    """The ranks that clients of the job have, ascending. The last is adapter.rank, whoever has it."""
    return tuple(
        sorted({job.adapter.rank, *(device.rank for device in job.simulation.devices if device.rank)})
    )


def ranks_in(job: Job, spec: AdapterSpec) -> "Ranks | None":
    """None where all clients have the same."""
    found = ranks_of(job)
    return Ranks(spec, found) if len(found) > 1 else None


def split(core: np.ndarray, ranks: tuple[int, ...]) -> list[np.ndarray]:
    """The pieces of a core [r, r], r the last of these ranks: [r1, r1], then vectors.

    >>> [piece.tolist() for piece in split(np.arange(9).reshape(3, 3), (2, 3))]
    [[[0, 1], [3, 4]], [2, 5, 6, 7, 8]]
    """
    first, *rings = np.split(core.ravel()[places(ranks)], [rank * rank for rank in ranks[:-1]])
    return [first.reshape(ranks[0], ranks[0]), *rings]


def join(pieces: list[np.ndarray], ranks: tuple[int, ...]) -> np.ndarray:
    """The core [r, r] of these pieces, r the last of these ranks."""
    core = np.empty(ranks[-1] ** 2, pieces[0].dtype)
    core[places(ranks)] = np.concatenate([piece.ravel() for piece in pieces])
    return core.reshape(ranks[-1], ranks[-1])


@cache
def places(ranks: tuple[int, ...]) -> np.ndarray:
    """Where the numbers of a core [r, r] lie in it, row by row, in the order in which
    they travel: int64 [r * r].
    """
    side = np.arange(ranks[-1])
    ring = np.searchsorted(ranks, np.maximum.outer(side, side), side="right")
    return np.argsort(ring.ravel(), kind="stable")


def at_rank(spec: AdapterSpec, rank: int) -> AdapterSpec:
    """What a client of this rank (0: the adapter's) trains and needs of the frame."""
    if not rank or rank == spec.rank:
        return spec
    cores = _cores(spec)
    trained = tuple(replace(t, shape=(rank, rank)) if t.name in cores else t for t in spec.trainable)
    frame = tuple(
        replace(t, shape=(rank, t.shape[1]) if t.name.endswith(".A") else (t.shape[0], rank))
        for t in spec.frame
    )
    return replace(spec, rank=rank, trainable=trained, frame=frame)


@dataclass(frozen=True)
class Ranks:
    """A job's ranks, ascending, with what is trained at the last of them."""

    spec: AdapterSpec
    all: tuple[int, ...]

    @cached_property
    def cores(self) -> frozenset[str]:
        return _cores(self.spec)

    @cached_property
    def schema(self) -> Schema:
        """What travels."""
        return Schema(
            tuple(
                piece
                for t in self.spec.trainable
                for piece in (self._pieces(t) if t.name in self.cores else (t,))
            ),
            self.spec.base_blocks,
        )

    def split(self, arrays: Arrays) -> Arrays:
        """The tensors of a client of any of the ranks, or some of them, as they travel."""
        found: Arrays = {}
        for name, array in arrays.items():
            if name in self.cores:
                ranks = self._up_to(len(array))
                found |= zip((_name(name, rank) for rank in ranks), split(array, ranks))
            else:
                found[name] = array
        return found

    def join(self, arrays: Arrays, rank: int = 0) -> Arrays:
        """The tensors that a client of this rank (0: the last) has, of a model as it travels."""
        ranks = self._up_to(rank or self.all[-1])
        return {
            t.name: join([arrays[_name(t.name, r)] for r in ranks], ranks)
            if t.name in self.cores
            else arrays[t.name]
            for t in self.spec.trainable
        }

    def leading(self, arrays: Arrays, rank: int) -> Arrays:
        """What of the tensors of the last rank a client of this rank has; 0: all."""
        return {name: a[:rank, :rank] if rank and name in self.cores else a for name, a in arrays.items()}

    def whole(self, arrays: Arrays) -> Arrays:
        """The tensors of a client of any rank as those of the last: with 0 where it has nothing."""
        return {
            name: np.pad(a, (0, self.all[-1] - len(a))) if name in self.cores else a
            for name, a in arrays.items()
        }

    def rank_of(self, packet: Packet) -> int:
        """Of the client that such a packet is for; 0 for the last.

        Raises Refused where it holds what no client of the job has.
        """
        for rank in self.all:
            if packet.arrays.keys() == {t.name for t in self.schema.held(rank).tensors}:
                return 0 if rank == self.all[-1] else rank
        raise Refused(
            "tensors",
            f"holds {len(packet.arrays)} of {len(self.schema.tensors)} pieces of a model, "
            f"which are those of none of the ranks {', '.join(map(str, self.all))}",
        )

    def trained(self, names: Collection[str], rank: int) -> tuple[str, ...] | None:
        """The tensors that these pieces are; None for all that a client of this rank (0: the last) has.

        Raises Refused for a part of one.
        """
        held = {
            t.name: [_name(t.name, r) for r in self._up_to(rank or self.all[-1])]
            if t.name in self.cores
            else [t.name]
            for t in self.spec.trainable
        }
        asked = set(names)
        found = tuple(name for name, pieces in held.items() if asked & set(pieces))
        if {piece for name in found for piece in held[name]} != asked:
            raise Refused(
                "tensors", "asks for a part of what a client of this rank has of a core to be trained"
            )
        return None if len(found) == len(held) else found

    def _pieces(self, core: TensorSpec) -> tuple[TensorSpec, ...]:
        first = TensorSpec(_name(core.name, self.all[0]), (self.all[0], self.all[0]), core.unit, self.all[0])
        return first, *(
            TensorSpec(_name(core.name, rank), (rank**2 - before**2,), core.unit, rank)
            for before, rank in pairwise(self.all)
        )

    def _up_to(self, rank: int) -> tuple[int, ...]:
        return self.all[: self.all.index(rank) + 1]


def _cores(spec: AdapterSpec) -> frozenset[str]:
    return frozenset(f"{x.name}.R" for x in spec.linears)


def _name(core: str, rank: int) -> str:
    return f"{core}.{rank}"
