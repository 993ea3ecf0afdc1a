"""The shape of a base, as far as an adapter asks: names, sizes and units. No weights, no torch."""

from dataclasses import dataclass

from fedtune.types import TensorSpec


@dataclass(frozen=True)
class Linear:
    """A linear map y = W x of the base: W is [outputs, inputs]. `short` is its name inside its block."""

    name: str
    short: str
    outputs: int
    inputs: int
    unit: str


@dataclass(frozen=True)
class Inverted:
    """An inverted bottleneck of a CNN: channels in and out, its stride, and how much smaller its input is
    than the image, along a side.
    """

    name: str
    inputs: int
    outputs: int
    stride: int
    reduction: int
    unit: str = "outside"


@dataclass(frozen=True)
class Layout:
    """The shape of a base: its linears, all its parameters, the task head beside it (empty for causal-lm),
    and its inverted bottlenecks.
    """

    linears: tuple[Linear, ...]
    parameters: tuple[TensorSpec, ...]
    head: tuple[TensorSpec, ...]
    inverted: tuple[Inverted, ...] = ()

    @property
    def size(self) -> int:
        return sum(p.size for p in self.parameters)
