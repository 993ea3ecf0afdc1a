"""Names and shapes of what is trained, from the layout of a base alone: no weights, no torch.

A layout says which linears and parameters a base has; a spec says which tensors a method trains
and which frozen ones (the frame) go with them. The wire, the coordinator, `fedtune plan` and the
edge need no more than this.
"""

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fedtune.errors import ModelError
from fedtune.models.layout import Layout, Linear
from fedtune.types import TensorSpec
from fedtune.wire import Schema

ADAPTER, DESCRIPTION = "adapter.safetensors", "adapter.json"
"""The files that an adapter is outside a run: its trained values, and what they are of."""


@dataclass(frozen=True)
class AdapterSpec:
    """What a method trains (`trainable`, in wire order) and what it keeps frozen beside the base (`frame`).

    `base_blocks`: the base's, where the method could train something in more of them
    than it does; else empty.
    """

    method: str
    rank: int
    scale: float
    linears: tuple[Linear, ...]
    trainable: tuple[TensorSpec, ...]
    frame: tuple[TensorSpec, ...]
    base_blocks: tuple[str, ...] = ()

    @cached_property
    def schema(self) -> Schema:
        return Schema(self.trainable, self.base_blocks)

    @property
    def size(self) -> int:
        """Trainable numbers."""
        return self.schema.size

    @property
    def head_size(self) -> int:
        return sum(t.size for t in self.trainable if t.unit == "head")


def of_units(spec: AdapterSpec, units: Collection[str]) -> AdapterSpec:
    """The same with nothing but these units."""
    trainable, frame = (tuple(t for t in found if t.unit in units) for found in (spec.trainable, spec.frame))
    return replace(
        spec,
        linears=tuple(x for x in spec.linears if x.unit in units),
        trainable=trainable,
        frame=frame,
        base_blocks=spec.schema.blocks,
    )


def target_linears(layout: Layout, targets: Sequence[str], method: str = "fed-sb") -> tuple[Linear, ...]:
    """The linears a job names: all of the blocks, or those whose name inside the block equals
    a target (globs allowed).

    Whole names are compared, never bare endings: "output.dense" does not mean "attention.output.dense".
    """
    blocks = [linear for linear in layout.linears if linear.unit.startswith("block.")]
    known = sorted({linear.short for linear in blocks})
    if not known:
        raise ModelError(
            f"adapter.method = {method!r}: this base has no linear layer inside its "
            'blocks; use "bias" or "full"'
        )
    for target in targets:
        if target != "all-linear" and not fnmatch.filter(known, target):
            raise ModelError(
                f"adapter.targets: {target!r} names no linear of this base; it has {', '.join(known)}"
            )
    return tuple(
        x for x in blocks if any(t == "all-linear" or fnmatch.fnmatchcase(x.short, t) for t in targets)
    )


def ranked_linears(layout: Layout, targets: Sequence[str], rank: int, method: str) -> tuple[Linear, ...]:
    """The linears a job names, all of which have room for this rank."""
    linears = target_linears(layout, targets, method)
    small = min(linears, key=lambda x: min(x.inputs, x.outputs))
    if rank > min(small.inputs, small.outputs):
        raise ModelError(
            f"adapter.rank = {rank}: at most {min(small.inputs, small.outputs)}, the smaller side "
            f"of {small.name}; lower it"
        )
    return linears


def factors(linears: Sequence[Linear], rank: int) -> tuple[TensorSpec, ...]:
    """A [rank, inputs] and B [outputs, rank] of each linear."""
    return tuple(
        t
        for x in linears
        for t in (
            TensorSpec(f"{x.name}.A", (rank, x.inputs), x.unit),
            TensorSpec(f"{x.name}.B", (x.outputs, rank), x.unit),
        )
    )
