"""Names and shapes of what is trained, from the layout of a base alone: no weights, no torch.

A layout says which linears and parameters a base has; a spec says which tensors a method trains
and which frozen ones (the frame) go with them. The wire, the coordinator, `fedtune plan` and the
edge need no more than this.
"""

import fnmatch
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fedtune.errors import ModelError
from fedtune.job import AdapterSection
from fedtune.models.layout import Inverted, Layout, Linear
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


def describe(layout: Layout, section: AdapterSection) -> AdapterSpec:
    """The spec of the job's method on this base.

    Raises:
        ModelError: the base has nothing this method can train, or a target names no linear of it.
    """
    linears, trainable, frame = _METHODS[section.method](layout, section)
    head = layout.head if section.train_head or section.method == "head" else ()
    if not trainable + head:
        raise ModelError(
            f"adapter.method = {section.method!r}: this base has nothing it can train; use another method"
        )
    scale = section.alpha / section.rank if section.alpha else 1.0
    return AdapterSpec(section.method, section.rank, scale, linears, (*trainable, *head), frame)


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


_Tensors = tuple[tuple[Linear, ...], tuple[TensorSpec, ...], tuple[TensorSpec, ...]]


def _fed_sb(layout: Layout, section: AdapterSection) -> _Tensors:
    linears = _with_rank(target_linears(layout, section.targets, section.method), section.rank)
    r = section.rank
    cores = tuple(TensorSpec(f"{x.name}.R", (r, r), x.unit) for x in linears)
    frame = tuple(
        t
        for x in linears
        for t in (
            TensorSpec(f"{x.name}.A", (r, x.inputs), x.unit),
            TensorSpec(f"{x.name}.B", (x.outputs, r), x.unit),
        )
    )
    return linears, cores, frame


def _lora(layout: Layout, section: AdapterSection) -> _Tensors:
    linears = _with_rank(target_linears(layout, section.targets, section.method), section.rank)
    r = section.rank
    factors = tuple(
        t
        for x in linears
        for t in (
            TensorSpec(f"{x.name}.A", (r, x.inputs), x.unit),
            TensorSpec(f"{x.name}.B", (x.outputs, r), x.unit),
        )
    )
    return linears, factors, ()


def _ffa_lora(layout: Layout, section: AdapterSection) -> _Tensors:
    """FFA-LoRA (Sun et al. 2024, arXiv:2403.12313): A is drawn once and stays, B is trained from 0, so
    that the mean over clients is exact.
    """
    linears, factors, _ = _lora(layout, section)
    frame, trained = (tuple(t for t in factors if t.name.endswith(end)) for end in (".A", ".B"))
    return linears, trained, frame


def _with_rank(linears: tuple[Linear, ...], rank: int) -> tuple[Linear, ...]:
    small = min(linears, key=lambda x: min(x.inputs, x.outputs))
    if rank > min(small.inputs, small.outputs):
        raise ModelError(
            f"adapter.rank = {rank}: at most {min(small.inputs, small.outputs)}, the smaller side "
            f"of {small.name}; lower it"
        )
    return linears


def _bias(layout: Layout, section: AdapterSection) -> _Tensors:
    return (), tuple(p for p in layout.parameters if p.name.rpartition(".")[2] == "bias"), ()


def _tinytl(layout: Layout, section: AdapterSection) -> _Tensors:
    """TinyTL's L+B: all biases, and a lite residual beside each inverted bottleneck
    (`adapters.lite_residual`).
    """
    if not layout.inverted:
        raise ModelError(
            'adapter.method = "tinytl": this base has no inverted bottlenecks (1x1, '
            'depthwise and 1x1 convolution); use "bias", "head" or "full", or for a text model "fed-sb"'
        )
    return (
        (),
        (*_bias(layout, section)[1], *(t for block in layout.inverted for t in lite_tensors(block))),
        (),
    )


def lite_tensors(block: Inverted) -> tuple[TensorSpec, ...]:
    """What is trained of a block's lite residual."""
    c, k = block.inputs, lite_kernel(block)
    shapes = {
        "conv.weight": (c, c // lite_groups(c), k, k),
        "norm.weight": (c,),
        "norm.bias": (c,),
        "point.weight": (block.outputs, c, 1, 1),
        "last.weight": (block.outputs,),
    }
    return tuple(TensorSpec(f"{block.name}.lite.{name}", shape, block.unit) for name, shape in shapes.items())


def lite_kernel(block: Inverted) -> int:
    """Side of the grouped kernel: 5, or 3 or 1 where the pooled input of an image of 256 pixels is smaller
    (the authors' rule, whatever the image).
    """
    side = max(1, 256 // block.reduction // 2)
    return 5 if side >= 5 else 3 if side >= 3 else 1


def lite_groups(channels: int) -> int:
    return 2 if channels % 2 == 0 else 1


def _full(layout: Layout, section: AdapterSection) -> _Tensors:
    return (), layout.parameters, ()


def _head(layout: Layout, section: AdapterSection) -> _Tensors:
    return (), (), ()


_METHODS: dict[str, Callable[[Layout, AdapterSection], _Tensors]] = {
    "fed-sb": _fed_sb,
    "lora": _lora,
    "ffa-lora": _ffa_lora,
    "bias": _bias,
    "tinytl": _tinytl,
    "full": _full,
    "head": _head,
}
