"""Backward operations that an exporter has no ONNX for, written with those that it has.

Each has a test against torch's own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def convolution_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a 2-d convolution to its input, weight and bias, those that are wanted.

    x [n, channels, height, width], weight [outputs, channels / groups, kh, kw], dy [n, outputs, h, w]. To the
    input it is a transposed convolution; to the weight a convolution in which examples and channels have
    changed places, group by group. Raises NotImplementedError for a transposed convolution, and for the
    weight of one with many groups (depthwise ones).
    """
    if transposed:
        raise NotImplementedError("training through a transposed convolution")
    dx = dw = None
    if wanted[0]:
        extra = [
            x.shape[2 + i]
            - (
                (dy.shape[2 + i] - 1) * stride[i]
                - 2 * padding[i]
                + dilation[i] * (weight.shape[2 + i] - 1)
                + 1
            )
            for i in range(2)
        ]
        dx = aten.convolution.default(dy, weight, None, stride, padding, dilation, True, extra, groups)
    if wanted[1]:
        if groups > MOST_GROUPS:
            raise NotImplementedError(f"training the weight of a convolution with {groups} groups")
        parts = [
            aten.convolution.default(
                xs.transpose(0, 1), dys.transpose(0, 1), None, dilation, padding, stride, False, [0, 0], 1
            ).transpose(0, 1)
            for xs, dys in zip(x.chunk(groups, 1), dy.chunk(groups, 1))
        ]
        dw = (parts[0] if groups == 1 else torch.cat(parts))[:, :, : weight.shape[2], : weight.shape[3]]
    return dx, dw, dy.sum((0, 2, 3)) if wanted[2] else None


MOST_GROUPS = 8
"""Groups whose weights get their gradient one by one, each with nodes of its own in the graph."""


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    train: bool,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a batch norm that uses its running statistics, of which dx and the bias's need no x.

    Raises NotImplementedError for one that does not.
    """
    if train or running_mean is None or running_var is None:
        raise NotImplementedError("training through a batch norm with the statistics of its batch")
    over, scale = [0, *range(2, dy.dim())], torch.rsqrt(running_var + eps)
    wide = [1, -1, *[1] * (dy.dim() - 2)]
    dx = dy * (scale if weight is None else scale * weight).view(wide) if wanted[0] else None
    dw = (dy * (x - running_mean.view(wide))).sum(over) * scale if wanted[1] else None
    return dx, dw, dy.sum(over) if wanted[2] else None


def avg_pool_backward(
    dy: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool,
    count_padding: bool,
    divisor: int | None,
) -> Tensor:
    """Every number goes back in equal parts to where it came from: a transposed convolution of each channel.

    Raises NotImplementedError where the parts are not equal.
    """
    stride = list(stride) or list(kernel)
    if ceil or divisor or (any(padding) and not count_padding):
        raise NotImplementedError("training through an average pool whose windows differ in size")
    extra = [
        x.shape[2 + i] - ((dy.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + kernel[i]) for i in range(2)
    ]
    weight = torch.full((1, 1, *kernel), 1 / (kernel[0] * kernel[1]), dtype=dy.dtype, device=dy.device)
    back = aten.convolution.default(
        dy.reshape(-1, 1, *dy.shape[2:]), weight, None, stride, padding, [1, 1], True, extra, 1
    )
    return back.reshape(x.shape)


def hardtanh_backward(dy: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Of ReLU6 among others: one bool a number, which need not wait for dy."""
    return torch.where((x > low) & (x < high), dy, 0.0)


def threshold_backward(dy: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Of ReLU."""
    return torch.where(x > threshold, dy, 0.0)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: convolution_backward,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten.avg_pool2d_backward.default: avg_pool_backward,
    aten.hardtanh_backward.default: hardtanh_backward,
    aten.threshold_backward.default: threshold_backward,
}
