"""Inverted bottlenecks of a base, found by structure: a 1x1 convolution that widens, a depthwise one, and
a 1x1 convolution that narrows.
"""

import math
from collections.abc import Sequence

from torch import nn

from fedtune.models.layout import Inverted

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def inverted_blocks(body: nn.Module) -> list[Inverted]:
    """In the order in which the body names them, which is taken for the order in which it
    runs them; needs no weights.

    Between the last two convolutions others may stand (squeeze-and-excitation). Where several nested
    modules hold the same block, it is the outermost that is not a mere list, so that the block's own sum
    with its input is inside.
    """
    convolutions = [m for m in body.modules() if isinstance(m, nn.Conv2d)]
    found: dict[nn.Conv2d, tuple[str, nn.Module]] = {}
    for name, module in body.named_modules():
        depthwise = _depthwise_of([m for m in module.modules() if isinstance(m, nn.Conv2d)]) if name else None
        if depthwise is not None and (
            depthwise not in found
            or isinstance(found[depthwise][1], _CONTAINERS) > isinstance(module, _CONTAINERS)
        ):
            found[depthwise] = name, module
    return [_described(name, module, depthwise, convolutions) for depthwise, (name, module) in found.items()]


def _depthwise_of(convolutions: Sequence[nn.Conv2d]) -> nn.Conv2d | None:
    """The depthwise convolution of a block made of these; None unless they are one inverted bottleneck."""
    depthwise = [
        place for place, m in enumerate(convolutions) if 1 < m.groups == m.in_channels == m.out_channels
    ]
    if depthwise != [1] or len(convolutions) < 3:
        return None
    widen, middle, narrow = convolutions[0], convolutions[1], convolutions[-1]
    pointwise = all(max(m.kernel_size) == 1 and m.groups == 1 for m in (widen, *convolutions[2:]))
    fits = (
        widen.in_channels
        < widen.out_channels
        == middle.in_channels
        == narrow.in_channels
        > narrow.out_channels
    )
    return middle if pointwise and fits else None


def _described(
    name: str, module: nn.Module, depthwise: nn.Conv2d, convolutions: Sequence[nn.Conv2d]
) -> Inverted:
    own = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    before = convolutions[: convolutions.index(own[0])]
    return Inverted(
        name,
        own[0].in_channels,
        own[-1].out_channels,
        int(depthwise.stride[0]),
        math.prod(int(m.stride[0]) for m in before),
    )
