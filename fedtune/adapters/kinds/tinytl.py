"""TinyTL's L+B (Cai et al. 2020, arXiv:2007.11622): all biases, and a lite residual beside each inverted
bottleneck (`adapters.layers.lite_residual`).
"""

import math
from collections.abc import Sequence

import numpy as np

from fedtune.adapters.kinds.method import AdapterMethod, Tensors
from fedtune.adapters.kinds.own import biases
from fedtune.common.seeds import generator
from fedtune.errors import ModelError
from fedtune.models.layout import Inverted, Layout
from fedtune.types import TensorSpec


def _tensors(layout: Layout, targets: Sequence[str], rank: int) -> Tensors:
    if not layout.inverted:
        raise ModelError(
            'adapter.method = "tinytl": this base has no inverted bottlenecks (1x1, '
            'depthwise and 1x1 convolution); use "bias", "head" or "full", or for a text model "fed-sb"'
        )
    return (), (*biases(layout), *(t for block in layout.inverted for t in lite_tensors(block))), ()


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


def start(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Round 0 of a tensor of a branch: kernels by He's normal draw from the seed,
    the first norm 1 and 0, the last scale 0.
    """
    if len(shape) == 4:
        return (
            generator(seed, f"lite:{name}").standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
        ).astype(np.float32)
    return np.ones(shape, np.float32) if name.endswith(".norm.weight") else np.zeros(shape, np.float32)


TINYTL = AdapterMethod(
    "tinytl",
    _tensors,
    start=start,
    no_lora="tinytl trains biases and small convolutions, which a LoRA does not hold",
)
