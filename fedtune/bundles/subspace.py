"""Forward-only training: a model is its start plus a sum of directions that a seed gives, so a model is one
number for each direction.

    theta(a) = theta_0 + sum over j of a_j z_j        z_j in {-1, +1}^P, 0 where the mask is, j = 1 .. K

A step of MeZO (Malladi et al. 2023, arXiv:2305.17333, Algorithm 1) along z_j measures two losses and moves
a_j alone. K directions serve the whole run, as in FedKSeed (Qin et al. 2024, arXiv:2312.06353), so whatever a
device missed, it rebuilds the model from K numbers. As theta is linear in a, averaging clients' numbers is
averaging their models; clipping, noise and secure sums work on them as on any tensor.

Where the papers draw z from a Gaussian, these are signs, as in SPSA (Spall 1992, IEEE TAC 37:3, section III):
they are bits of Philox (Salmon et al. 2011), a counter-based generator, so z is the same everywhere, and so
is theta: float64 sums in the order of j, rounded once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedtune.adapters.ranks import ranks_in
from fedtune.adapters.spec import AdapterSpec
from fedtune.errors import JobError
from fedtune.job import Job
from fedtune.stateful.methods import method_of
from fedtune.types import Arrays, TensorSpec
from fedtune.wire import Pieces, Schema

NAME = "directions"
MOST = 2 * 10**9
"""Sums: some ten seconds, which a client takes in every round."""


@dataclass(frozen=True)
class Subspace:
    """`schema`: the adapter's tensors, P numbers. `start`: their values, float32 [P]. `count`:
    K. `share`: see `small`.
    """

    schema: Schema
    start: np.ndarray
    count: int
    seed: int
    share: float = 1.0

    def direction(self, j: int) -> np.ndarray:
        """z_j, float32 [P]. j from 0."""
        return (
            signs(self.seed, j, len(self.start))
            if self._moved is None
            else signs(self.seed, j, len(self.start)) * self._moved
        )

    def expand(self, numbers: np.ndarray) -> Pieces:
        """The model with these K numbers; bit for bit the same on every machine."""
        total = self.start.astype(np.float64)
        for j in np.flatnonzero(numbers).tolist():
            # a sign times a number is exact: only the sum rounds
            total += np.float64(numbers[j]) * self.direction(j)
        return Pieces(total.astype(np.float32), self.schema.layout)

    @cached_property
    def _moved(self) -> np.ndarray | None:
        if self.share == 1.0:
            return None
        return np.concatenate(
            [small(values.ravel(), self.share) for values in Pieces(self.start, self.schema.layout).values()]
        )


def signs(seed: int, j: int, size: int) -> np.ndarray:
    """float32 [size] of -1 and 1: the bits of Philox4x64-10 with the key (seed,
    j) and counters from 1, lowest bit first.
    """
    words = np.random.Philox(key=np.array([seed, j], np.uint64)).random_raw(-(-size // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=size, bitorder="little")
    return bits.astype(np.float32) * 2 - 1


def small(values: np.ndarray, share: float) -> np.ndarray:
    """1 for this share (rounded up) of the values of a tensor with the smallest size,
    the first of equal ones, else 0; float32.

    The mask of Sparse MeZO (Liu et al. 2024, arXiv:2402.15751, section 3), which leaves large weights
    alone. Fixed at the start of the run: one that changed with the model would differ between parties
    and could not be added up.
    """
    kept = np.argsort(np.abs(values), kind="stable")[: int(np.ceil(share * values.size))]
    mask = np.zeros(values.size, np.float32)
    mask[kept] = 1.0
    return mask


def travelling(job: Job, spec: AdapterSpec) -> Schema:
    """What models and updates of this job hold: the trained tensors, those of them that do not stay on
    the clients, more beside them, the pieces of cores that clients of unequal ranks share, or the
    numbers of the directions.

    Raises JobError for more directions than a model of this size can be rebuilt from in bearable time.
    """
    if job.edge.mode != "forward":
        ranks = ranks_in(job, spec)
        return method_of(job).travelling(spec.schema) if ranks is None else ranks.schema
    if job.edge.directions * spec.size > MOST:
        raise JobError(
            [
                f"edge.directions = {job.edge.directions}: rebuilding {spec.size:,} trained numbers from so "
                f"many directions takes {job.edge.directions * spec.size:.0e} sums, at most {MOST:.0e} are "
                f"borne; lower it to {MOST // spec.size}, or train less with adapter.method"
            ]
        )
    return Schema((TensorSpec(NAME, (job.edge.directions,), NAME),))


def subspace_of(job: Job, spec: AdapterSpec, initial: Arrays) -> Subspace:
    """Of a job that trains with forward passes alone. initial: the trained tensors before round 1."""
    start = np.concatenate([initial[t.name].ravel() for t in spec.schema.tensors])
    return Subspace(spec.schema, start, job.edge.directions, job.federation.seed, job.edge.share)


def order(space: Subspace, rng: np.random.Generator) -> Iterator[int]:
    """Directions for the steps of a round: all in an order of the client's own, again and again."""
    while True:
        yield from rng.permutation(space.count).tolist()
