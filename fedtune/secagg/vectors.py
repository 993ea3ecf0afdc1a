"""Tensors to the one vector of a round, and from its sum to means.

A vector is the numbers of all tensors in schema order, zeros where the client did not train, then one
whole number for each unit of the schema: 1 if the client trained it, else 0. Their sums say by how
many a tensor's sum is to be divided. So all clients count alike; and the coordinator learns how many
trained each unit, not who.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.common.trees import check_same
from fedtune.errors import Refused, ShapeMismatch
from fedtune.secagg.quantise import Grid, Uniform, dequantise, quantise
from fedtune.types import Arrays
from fedtune.wire import Pieces, Schema


@dataclass(frozen=True)
class Totals:
    """sums: of the clients' tensors, float64, all of the schema. counts: by unit,
    of clients that trained it.
    """

    sums: Arrays
    counts: dict[str, int]


def length(schema: Schema) -> int:
    """Numbers in a vector."""
    return schema.size + len(schema.units)


def pack(arrays: Arrays, schema: Schema, units: Sequence[str], grid: Grid, uniform: Uniform) -> np.ndarray:
    """[length(schema)] unsigned integers.

    arrays: the tensors of `units` and no others, numbers within the grid's clip (ValueError). Raises
    ShapeMismatch where they differ from the schema.
    """
    return counted(quantise(flat(arrays, schema, units), grid, uniform), schema, units)


def flat(arrays: Arrays, schema: Schema, units: Sequence[str]) -> np.ndarray:
    """[schema.size] floats in schema order, zeros for the units that are not there. Raises as `pack`."""
    trained = schema.of_units(units)
    check_same(arrays, {t.name: np.broadcast_to(np.float32(0), t.shape) for t in trained})
    unknown = set(units) - set(schema.units)
    if unknown:
        raise ShapeMismatch(f"unit {min(unknown)!r} is not in the schema")
    return np.concatenate(
        [arrays[t.name].ravel() if t.name in arrays else np.zeros(t.size) for t in schema.tensors]
    )


def counted(integers: np.ndarray, schema: Schema, units: Sequence[str]) -> np.ndarray:
    """[length(schema)]: [schema.size] integers, and what says which units they hold."""
    return np.concatenate([integers, np.array([unit in units for unit in schema.units], integers.dtype)])


def unpack(total: np.ndarray, schema: Schema, grid: Grid, clients: int) -> Totals:
    """The sums behind the sum of `clients` packed vectors.

    Raises Refused("range") when no such vectors have this sum.
    """
    if total.shape != (length(schema),):
        raise ShapeMismatch(f"a sum {list(total.shape)}, the schema has [{length(schema)}]")
    counts = {unit: int(count) for unit, count in zip(schema.units, total[schema.size :])}
    if max(counts.values(), default=0) > clients:
        raise Refused("range", f"a unit was trained by more than the {clients} clients of the sum")
    return Totals(Pieces(dequantise(total[: schema.size], grid, clients), schema.layout), counts)


def means(totals: Totals, schema: Schema, reference: Arrays) -> Arrays:
    """Each tensor's mean over those who trained it, in the dtype of `reference`,
    whose tensor stays where no one did.

    Source: per tensor as in arXiv:2408.15600, section 3, with equal weights.
    """
    check_same(totals.sums, reference)
    counts = {t.name: totals.counts[t.unit] for t in schema.tensors}
    return {n: (totals.sums[n] / counts[n]).astype(a.dtype) if counts[n] else a for n, a in reference.items()}
