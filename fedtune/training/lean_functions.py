"""The functions of torch that have a lean twin, and the twins: what `training.lean` keeps instead of
what stock autograd keeps.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten

SCORES = 2**21
"""Most attention scores of a layer that are written out: 8 MB of float32."""
_STEPS = 2.0**15 - 1
SLOPE_ERROR = 0.6 / _STEPS
"""Largest error of a kept slope: half a step, and rounding."""
_STRETCH = 2**18
_THIN_SCALE = 1e-3
"""A layer norm whose smallest |scale| is below this share of its largest cannot be turned back safely; it
keeps what stock torch keeps.
"""


class _Conv2d(torch.autograd.Function):
    """With a frozen kernel the gradient to the input needs the kernel, and of the input only its shape."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.how, ctx.shape, ctx.bias = (
            (stride, padding, dilation),
            x.shape,
            None if bias is None else list(bias.shape),
        )
        ctx.groups = groups
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        wanted = [ctx.needs_input_grad[0], False, ctx.needs_input_grad[2]]
        # the empty stand-in for the input is never read, so its memory is never touched
        dx, _, db = aten.convolution_backward(
            dy,
            dy.new_empty(ctx.shape),
            *ctx.saved_tensors,
            ctx.bias,
            *ctx.how,
            False,
            [0, 0],
            ctx.groups,
            wanted,
        )
        return dx, None, db, None, None, None, None


class _BatchNorm(torch.autograd.Function):
    """With frozen statistics and scale a norm is y = scale * x + shift:
    its gradients are scale * dy and sum(dy).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(mean, var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy = grads[0].contiguous()
        mean, var, weight = ctx.saved_tensors
        wanted, none = [ctx.needs_input_grad[0], False, ctx.needs_input_grad[4]], dy.new_empty(0)
        # dy stands in for the input, which torch's kernel uses for the gradient of the scale alone
        dx, _, db = aten.native_batch_norm_backward(
            dy, dy, weight, mean, var, none, none, False, ctx.eps, wanted
        )
        return dx, None, None, None, db, None


class _Clamp(torch.autograd.Function):
    """min(max(x, low), high), and which values lie strictly between, a bit each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(pack_between(x, low, high))
        ctx.shape = x.shape
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (bits,) = ctx.saved_tensors
        return unpack(bits, ctx.shape).to(grads[0].dtype).mul_(grads[0]), None, None


def pack_between(x: Tensor, low: float, high: float) -> Tensor:
    """uint8 [ceil(n / 8)]: a bit for each of n values, 1 where low < x < high.

    NumPy packs many times faster than torch can.
    """
    if not _plain(x):
        return pack_slowly((x > low) & (x < high))
    values = x.detach().numpy()
    inside = values > low
    if high != float("inf"):
        inside &= values < high
    return torch.from_numpy(np.packbits(inside))


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros and ones of this shape, to multiply by."""
    if not _plain(bits):
        return unpack_slowly(bits, shape)
    return (
        torch.from_numpy(np.unpackbits(bits.numpy(), count=int(np.prod(shape)))).view(torch.int8).view(*shape)
    )


def pack_slowly(mask: Tensor) -> Tensor:
    """The same in torch alone: for tensors that hold no values, and as a check."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    return (flat.view(-1, 8) << torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)).sum(
        1, dtype=torch.uint8
    )


def unpack_slowly(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The reverse, in torch alone."""
    ones = (bits[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)) & 1
    return ones.flatten()[: int(np.prod(shape))].view(*shape)


def _plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)


class _AvgPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *how: Any) -> Tensor:
        ctx.shape, ctx.how = x.shape, how
        return aten.avg_pool2d(x, *how)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        return aten.avg_pool2d_backward(dy, dy.new_empty(ctx.shape), *ctx.how), *([None] * len(ctx.how))


class _AdaptiveAvgPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Sequence[int]) -> Tensor:
        ctx.shape = x.shape
        return aten._adaptive_avg_pool2d(x, size)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        return aten._adaptive_avg_pool2d_backward(dy, dy.new_empty(ctx.shape)), None


class _LayerNorm(torch.autograd.Function):
    """Keeps y and turns it back: (y - bias) / weight is the normalised input, of which the gradient is made.
    y is the next layers' input as well, so it is often kept already (the same is done in NVIDIA's Apex, where
    it is called memory_efficient).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: list[int], weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, _, rstd = aten.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(y, rstd, weight, bias)
        ctx.normalized = shape
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        y, rstd, weight, bias = ctx.saved_tensors
        normal = y / weight if bias is None else (y - bias).div_(weight)
        wanted = [ctx.needs_input_grad[0], False, ctx.needs_input_grad[3]]
        dx, _, db = aten.native_layer_norm_backward(
            grads[0],
            normal,
            ctx.normalized,
            torch.zeros_like(rstd),
            torch.ones_like(rstd),
            weight,
            bias,
            wanted,
        )
        return None if dx is None else dx.mul_(rstd), None, None, db, None


class _Smooth(torch.autograd.Function):
    """An activation by value, with its slope at each value in 16 bits.

    `backward`: torch's own, into `grad_input`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, call: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(keep_slopes(x, backward))
        return call(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,), (kept,) = grads, ctx.saved_tensors
        return kept.to(dy.dtype).add_(0.5 * _STEPS).mul_(1 / _STEPS).mul_(dy), None, None


def keep_slopes(x: Tensor, backward: Callable[..., Tensor]) -> Tensor:
    """int16 of x's shape: round(32767 * (slope - 0.5)), for slopes in (-0.5, 1.5).

    In stretches, so that the slopes in float32 never stand whole.
    """
    flat, kept = x.reshape(-1), torch.empty(x.shape, dtype=torch.int16, device=x.device)
    slope, out = x.new_empty(min(_STRETCH, len(flat))), kept.view(-1)
    for begin in range(0, len(flat), _STRETCH):
        part = flat[begin : begin + _STRETCH]
        own = slope[: len(part)].fill_(_STEPS)
        backward(own, part, grad_input=own)
        out[begin : begin + _STRETCH].copy_(own.sub_(0.5 * _STEPS).round_())
    return kept


class _Attention(torch.autograd.Function):
    """Stands for softmax(scale * Q K' + mask) V where it is made again and nobody reads it: it notes q, k and
    v, and computes nothing.

    q, k, v [examples, heads, tokens, width]. The backward pass is written out as batched products,
    which on short texts is faster than torch's own kernel, and needs neither the result nor what
    that kernel keeps beside it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, mask = ctx.saved_tensors
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v, grads[0])]
        p, (qs, ks, vs, do) = _probabilities(flat[0], flat[1], mask, ctx.scale, q.shape[:2]), flat
        ds = aten._softmax_backward_data(do @ vs.transpose(1, 2), p, -1, p.dtype)
        dq, dk, dv = (
            (ds @ ks).mul_(ctx.scale),
            (ds.transpose(1, 2) @ qs).mul_(ctx.scale),
            p.transpose(1, 2) @ do,
        )
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), None, None


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, lead: Sequence[int]) -> Tensor:
    scores = torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2), beta=0, alpha=scale)
    if mask is not None:  # true where a token may look, or what is added
        added = (
            torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
            if mask.dtype == torch.bool
            else mask
        )
        scores.view(*lead, *scores.shape[1:]).add_(added)
    return scores.softmax(-1)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    if weight.requires_grad or isinstance(padding, str) or input.dim() != 4:
        return None
    return _Conv2d.apply(input, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)


def _batch_norm(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or (weight is not None and weight.requires_grad):
        return None
    return _BatchNorm.apply(input, running_mean, running_var, weight, bias, eps)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    return _Clamp.apply(input, min_val, max_val)


def _relu6(input: Tensor, inplace: bool = False) -> Tensor:
    return _Clamp.apply(input, 0.0, 6.0)


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return _Clamp.apply(input, 0.0, float("inf"))


def _avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    kernel = _pair(kernel_size)
    return _AvgPool2d.apply(
        input,
        kernel,
        kernel if stride is None else _pair(stride),
        _pair(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )


def _adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor | None:
    size = _pair(output_size)
    # to one value is a mean, which keeps nothing
    return None if None in size or size == [1, 1] else _AdaptiveAvgPool2d.apply(input, size)


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor | None:
    if weight is None or weight.requires_grad or not input.requires_grad:
        return None
    if _plain(weight) and weight.abs().min() < _THIN_SCALE * weight.abs().max():
        return None
    return _LayerNorm.apply(input, list(normalized_shape), weight, bias, eps)


def _smooth(
    backward: Callable[..., Tensor], call: Callable[[Tensor], Tensor], input: Tensor, inplace: bool = False
) -> Tensor | None:
    return _Smooth.apply(input, call, backward) if input.requires_grad else None


def _hardswish_backward(dy: Tensor, x: Tensor, grad_input: Tensor) -> Tensor:
    return aten.hardswish_backward.out(dy, x, out=grad_input)


def _gelu(input: Tensor, approximate: str = "none") -> Tensor | None:
    return _smooth(
        partial(aten.gelu_backward.grad_input, approximate=approximate),
        partial(F.gelu, approximate=approximate),
        input,
    )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Where a result is read or texts are long, torch's kernel is right: it keeps q, k, v and the result,
    for as long as one layer's backward takes.
    """
    scores = query.shape[:-1].numel() * key.shape[-2]
    if (
        dropout_p
        or enable_gqa
        or query.dim() != 4
        or scores > SCORES
        or value.shape != query.shape
        or (attn_mask is not None and attn_mask.requires_grad)
    ):
        return None
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return _Attention.apply(query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)


EXACT: Mapping[Any, Callable[..., Tensor | None]] = {
    torch.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.hardtanh: _hardtanh,
    F.relu6: _relu6,
    F.relu: _relu,
    torch.relu: _relu,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
}
"""Twins by torch function, called like it; None where the twin does not apply, and torch's own is used.

Gradients are stock autograd's, bit for bit.
"""

ALL: Mapping[Any, Callable[..., Tensor | None]] = {
    **EXACT,
    F.layer_norm: _layer_norm,
    F.gelu: _gelu,
    F.silu: partial(_smooth, aten.silu_backward.grad_input, F.silu),
    F.hardswish: partial(_smooth, _hardswish_backward, F.hardswish),
    F.scaled_dot_product_attention: _attention,
}
"""With those whose gradients differ by rounding."""
