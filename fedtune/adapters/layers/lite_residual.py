"""TinyTL's lite residual modules: a second, trained branch beside each inverted bottleneck, at half its
resolution and without its widening.

Source: TinyTL (Cai et al. 2020, arXiv:2007.11622, section 3.2). Where this differs from the authors' code:
they train the whole base anew with group norm, weight standardisation and the branches in it; here the base
is taken as it comes, with its frozen batch norms, and the branches start at random (drawn from the seed).
Their last scale starts at 0, so that the base's output is unchanged. The authors lose up to 7 points by
random branches, against branches trained on ImageNet with the base (their Random-L+B).
"""

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.adapters.kinds.tinytl import lite_groups, lite_kernel
from fedtune.adapters.layers.attachment import Attachment
from fedtune.adapters.spec import AdapterSpec
from fedtune.models.base import TunableModel, layout
from fedtune.models.layout import Inverted
from fedtune.types import Arrays

CHILD = "lite"
"""Name of the branch among a block's children, and so in the names of its tensors."""
_PER_GROUP = 8


class LiteResidual(nn.Module):
    """pool 2x2 -> grouped k x k convolution -> norm -> ReLU -> 1x1 convolution -> norm -> bilinear
    up to the block's output.

    x [n, inputs, h, w] -> [n, outputs, *size]. The shift of the last norm stays at 0:
    the block's own last bias does the same.
    """

    def __init__(self, block: Inverted) -> None:
        super().__init__()
        k = lite_kernel(block)
        self.conv = nn.Conv2d(
            block.inputs, block.inputs, k, block.stride, k // 2, groups=lite_groups(block.inputs), bias=False
        )
        self.norm = nn.GroupNorm(_norm_groups(block.inputs), block.inputs)
        self.point = nn.Conv2d(block.inputs, block.outputs, 1, bias=False)
        self.last = nn.GroupNorm(_norm_groups(block.outputs), block.outputs)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        small = F.avg_pool2d(x, 2) if min(x.shape[2:]) > 1 else x
        y = self.last(self.point(F.relu(self.norm(self.conv(small)))))
        return F.interpolate(y, size=size, mode="bilinear", align_corners=False)


def insert(body: nn.Module, blocks: tuple[Inverted, ...]) -> None:
    """Gives each block a branch, whose result is added to the block's own. Changes `body` in place."""
    for block in blocks:
        module = body.get_submodule(block.name)
        module.add_module(CHILD, LiteResidual(block))
        module.register_forward_hook(_add_branch)


def _add_branch(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    branch = module.get_submodule(CHILD)
    return out + branch(args[0], (out.shape[2], out.shape[3]))


def _norm_groups(channels: int) -> int:
    """Groups of 8 channels, or of the largest number below that divides them."""
    return channels // math.gcd(channels, _PER_GROUP)


def _insert(model: TunableModel) -> None:
    insert(model.body, layout(model).inverted)
    model.requires_grad_(False)


def _attach(model: TunableModel, spec: AdapterSpec, frame: Arrays) -> Mapping[str, Tensor]:
    _insert(model)
    return dict(model.body.named_parameters())


ATTACHMENT = Attachment(_attach, _insert)
