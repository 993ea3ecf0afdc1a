"""Methods that train parameters which the base has already, and put nothing beside it."""

from collections.abc import Sequence

from fedtune.adapters.kinds.method import AdapterMethod, Tensors
from fedtune.models.layout import Layout
from fedtune.types import TensorSpec


def biases(layout: Layout) -> tuple[TensorSpec, ...]:
    return tuple(p for p in layout.parameters if p.name.rpartition(".")[2] == "bias")


def _bias(layout: Layout, targets: Sequence[str], rank: int) -> Tensors:
    return (), biases(layout), ()


def _full(layout: Layout, targets: Sequence[str], rank: int) -> Tensors:
    return (), layout.parameters, ()


def _head(layout: Layout, targets: Sequence[str], rank: int) -> Tensors:
    return (), (), ()


BIAS = AdapterMethod(
    "bias", _bias, no_lora="bias trains biases, which a LoRA does not hold", biases_only=True
)
FULL = AdapterMethod("full", _full, no_lora="full trains every weight, which a LoRA does not hold")
HEAD = AdapterMethod(
    "head", _head, no_lora="head trains nothing but the head, which is in adapter/", head_only=True
)
