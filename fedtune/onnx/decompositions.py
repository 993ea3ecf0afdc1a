"""Backward operations that an exporter has no ONNX for, written with those that it has. Each has a test against torch's own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool, output_padding: Sequence[int], groups: int, wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a 2-d convolution to its input, weight and bias, those that are wanted.

    x [n, channels, height, width], weight [outputs, channels / groups, kh, kw], dy [n, outputs, h, w]. To the input it is a transposed
    convolution; to the weight a convolution in which examples and channels have changed places, group by group.
    Raises NotImplementedError for a transposed convolution, and for the weight of one with many groups (depthwise ones).
    """
    if transposed:
        raise NotImplementedError("training through a transposed convolution")
    dx = dw = None
    if wanted[0]:
        extra = [x.shape[2 + i] - ((dy.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1) for i in range(2)]
        dx = aten.convolution.default(dy, weight, None, stride, padding, dilation, True, extra, groups)
    if wanted[1]:
        if groups > MOST_GROUPS:
            raise NotImplementedError(f"training the weight of a convolution with {groups} groups")
        parts = [
            aten.convolution.default(xs.transpose(0, 1), dys.transpose(0, 1), None, dilation, padding, stride, False, [0, 0], 1).transpose(0, 1)
            for xs, dys in zip(x.chunk(groups, 1), dy.chunk(groups, 1))
        ]
        dw = (parts[0] if groups == 1 else torch.cat(parts))[:, :, : weight.shape[2], : weight.shape[3]]
    return dx, dw, dy.sum((0, 2, 3)) if wanted[2] else None


MOST_GROUPS = 8
"""Groups whose weights get their gradient one by one, each with nodes of its own in the graph."""

TABLE: dict[Any, Callable[..., Any]] = {aten.convolution_backward.default: convolution_backward}
