"""Layers that hold the weights of many models at once: row k of a stack [K,
...] is applied to the examples of model k alone.

Each stands in for a plain layer while many clients are trained over one frozen base (`Stack.installed`). What
is frozen is applied to all rows together; only the small trained part is applied model by model, over rows
brought together by model. Since no two models share a trained number, one backward pass gives every model its
own gradient. With one model per example the stack's gradients are the per-example gradients of DP-SGD.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.adapters.layers.stacked import Examples, NotStackable, Stacked, Twin
from fedtune.adapters.methods import STACKED, Parameters


class _StackedLinear(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        plain: nn.Linear = self.plain
        flat = x.reshape(-1, x.shape[-1])
        rows, weight, bias = self.rows(*x.shape[:-1]), self.get("weight"), self.get("bias")
        if weight is None:
            assert bias is not None
            y = torch.addmm(F.linear(flat, plain.weight), rows.belongs, bias)
        elif bias is None:
            y = rows.scatter(rows.gather(flat) @ weight.transpose(1, 2))
            y = y if plain.bias is None else y + plain.bias
        else:
            y = rows.scatter(torch.baddbmm(bias[:, None], rows.gather(flat), weight.transpose(1, 2)))
        return y.view(*x.shape[:-1], -1)


class _StackedLayerNorm(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        plain: nn.LayerNorm = self.plain
        weight, bias = self.get("weight"), self.get("bias")
        frozen_bias = plain.bias if weight is None and bias is None else None
        y = F.layer_norm(
            x, plain.normalized_shape, plain.weight if weight is None else None, frozen_bias, plain.eps
        )
        flat = y.reshape(-1, y.shape[-1])
        rows = self.rows(*x.shape[:-1])
        if weight is not None:
            flat = flat * (rows.belongs @ weight)
            flat = flat if bias is not None or plain.bias is None else flat + plain.bias
        if bias is not None:
            flat = torch.addmm(flat, rows.belongs, bias)
        return flat.view_as(x)


class _StackedConv2d(Stacked):
    """x [n, channels, height, width].

    A trained kernel becomes one convolution with a group for each model.
    """

    def forward(self, x: Tensor) -> Tensor:
        plain: nn.Conv2d = self.plain
        rows, weight, bias = self.rows(len(x)), self.get("weight"), self.get("bias")
        if weight is None:
            y = plain._conv_forward(x, plain.weight, None)
        else:
            many = rows.gather(x).transpose(0, 1).flatten(1, 2)  # [width, models * channels, ...]
            out = F.conv2d(
                many,
                weight.flatten(0, 1),
                None,
                plain.stride,
                plain.padding,
                plain.dilation,
                plain.groups * rows.models,
            )
            y = rows.scatter(
                out.view(rows.width, rows.models, plain.out_channels, *out.shape[2:]).transpose(0, 1)
            )
        if bias is not None:
            return y + (rows.belongs @ bias)[:, :, None, None]
        return y if plain.bias is None else y + plain.bias[:, None, None]


class _StackedNorm2d(Stacked):
    """A norm of images, whose scale and shift come after it."""

    def normal(self, x: Tensor, weight: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        plain, rows, weight, bias = self.plain, self.rows(len(x)), self.get("weight"), self.get("bias")
        y = self.normal(x, plain.weight if weight is None else None)
        if weight is not None:
            y = y * (rows.belongs @ weight)[:, :, None, None]
        shift = plain.bias[:, None, None] if bias is None else (rows.belongs @ bias)[:, :, None, None]
        return y + shift


class _StackedBatchNorm2d(_StackedNorm2d):
    """In eval mode: running statistics, which are never trained here."""

    def normal(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return F.batch_norm(
            x, self.plain.running_mean, self.plain.running_var, weight, None, False, 0.0, self.plain.eps
        )


class _StackedGroupNorm(_StackedNorm2d):
    def normal(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return F.group_norm(x, self.plain.num_groups, weight, None, self.plain.eps)


class _StackedEmbedding(Stacked):
    def forward(self, ids: Tensor) -> Tensor:
        weight, flat = self.values["weight"], ids.reshape(-1)
        places = self.rows(*ids.shape).owner * weight.shape[1] + flat
        return weight.flatten(0, 1).index_select(0, places).view(*ids.shape, -1)


_STACKED: Mapping[type[nn.Module], Twin] = {
    **STACKED,
    nn.Linear: (_StackedLinear, frozenset({"weight", "bias"})),
    nn.LayerNorm: (_StackedLayerNorm, frozenset({"weight", "bias"})),
    nn.Conv2d: (_StackedConv2d, frozenset({"weight", "bias"})),
    nn.BatchNorm2d: (_StackedBatchNorm2d, frozenset({"weight", "bias"})),
    nn.GroupNorm: (_StackedGroupNorm, frozenset({"weight", "bias"})),
    nn.Embedding: (_StackedEmbedding, frozenset({"weight"})),
}


class Stack:
    """The stacked twins of all layers of a model that hold trained tensors.

    Args:
        model: with its adapter on it (`adapters.methods.attach`).
        parameters: what `attach` returned: the trained tensors by name.

    Raises NotStackable.
    """

    def __init__(self, model: nn.Module, parameters: Parameters) -> None:
        self.device = next(iter(parameters.values())).device
        places = {id(p): name for name, p in parameters.items()}
        self._places: list[tuple[nn.Module, str, nn.Module, Stacked]] = []
        self._values: dict[str, tuple[Stacked, str]] = {}
        self._collect(model, places)
        if missing := [name for name in parameters if name not in self._values]:
            raise NotStackable(f"{missing[0]} lies in a layer that cannot be stacked")

    def _collect(self, parent: nn.Module, places: dict[int, str]) -> None:
        for child_name, child in parent.named_children():
            own = _STACKED.get(type(child))
            found = (
                {}
                if own is None
                else {local: places[id(p)] for local, p in child.named_parameters() if id(p) in places}
            )
            if own is None or not found:
                self._collect(child, places)
            elif found.keys() <= own[1]:
                stacked = own[0](child)
                self._places.append((parent, child_name, child, stacked))
                self._values |= {name: (stacked, local) for local, name in found.items()}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the model runs stacked; outside it is as it was."""
        try:
            for parent, name, _, stacked in self._places:
                parent._modules[name] = stacked
            yield
        finally:
            for parent, name, plain, stacked in self._places:
                parent._modules[name] = plain
                stacked.values, stacked.now = {}, None

    def set(self, values: Mapping[str, Tensor], now: Examples) -> None:
        """Values of all trained tensors, [K, *shape], and the examples that run next."""
        for name, value in values.items():
            stacked, local = self._values[name]
            stacked.values[local] = value
        for _, _, _, stacked in self._places:
            stacked.now = now
