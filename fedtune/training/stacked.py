"""Layers that hold the weights of many models at once: row k of a stack [K,
...] is applied to the examples of model k alone.

Each stands in for a plain layer while many clients are trained over one frozen base (`Stack.installed`). What
is frozen is applied to all rows together; only the small trained part is applied model by model, over rows
brought together by model. Since no two models share a trained number, one backward pass gives every model its
own gradient. With one model per example the stack's gradients are the per-example gradients of DP-SGD.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.adapters.layers.fed_sb import SBLinear, SBProduct
from fedtune.adapters.layers.lora import LoRALinear
from fedtune.adapters.methods import Parameters


class Rows:
    """Which model each of n rows belongs to: `owner` int64 [n], values below `models`."""

    def __init__(self, owner: np.ndarray, models: int, device: torch.device) -> None:
        counts = np.bincount(owner, minlength=models)
        self.models, self.width, self.device, self._owner = models, int(counts.max(initial=1)), device, owner
        order = np.argsort(owner, kind="stable")
        starts = np.cumsum(counts) - counts
        slot = np.empty(len(owner), np.int64)
        slot[order] = owner[order] * self.width + np.arange(len(owner)) - starts[owner[order]]
        self._dense = len(owner) == models * self.width and bool((slot == np.arange(len(owner))).all())
        self._slot = torch.from_numpy(slot).to(device)

    def gather(self, x: Tensor) -> Tensor:
        """[n, ...] -> [models, width, ...], the rows of each model together;
        zeros where a model has fewer.
        """
        if self._dense:
            return x.reshape(self.models, self.width, *x.shape[1:])
        out = x.new_zeros(self.models * self.width, *x.shape[1:])
        return out.index_copy(0, self._slot, x).view(self.models, self.width, *x.shape[1:])

    def scatter(self, x: Tensor) -> Tensor:
        """[models, width, ...] -> [n, ...]: the reverse."""
        flat = x.reshape(self.models * self.width, *x.shape[2:])
        return flat if self._dense else flat.index_select(0, self._slot)

    @cached_property
    def owner(self) -> Tensor:
        return torch.from_numpy(self._owner).to(self.device)

    @cached_property
    def belongs(self) -> Tensor:
        """float32 [n, models]: 1 where the row is the model's. Spreading and summing are products with it."""
        return F.one_hot(self.owner, self.models).float()


@dataclass
class Examples:
    """The examples that run now: `owner` [n] is the model of each, `lengths` [n] the rows each has in
    the layers of a packed row.
    """

    owner: np.ndarray
    models: int
    lengths: np.ndarray | None
    device: torch.device
    _rows: dict[tuple[int, ...], Rows] = field(default_factory=dict)

    def rows(self, *shape: int) -> Rows:
        """For a layer whose input has these dimensions before the features': [n], [n, ...] (padded), or
        packed tokens ([1, tokens]).
        """
        if shape not in self._rows:
            self._rows[shape] = Rows(self._owners(shape), self.models, self.device)
        return self._rows[shape]

    def _owners(self, shape: tuple[int, ...]) -> np.ndarray:
        n = len(self.owner)
        if self.lengths is not None:
            if shape in ((1, tokens := int(self.lengths.sum())), (tokens,)):
                return np.repeat(self.owner, self.lengths)
            if shape == (1,):  # a pooler that sees the row's first token, and whose result nobody reads
                return np.zeros(1, np.int64)
        if shape[0] != n or (self.lengths is not None and shape != (n,)):
            raise NotStackable(f"a layer mixes examples: it sees {shape} where there are {n}")
        return np.repeat(self.owner, math.prod(shape[1:]))


class NotStackable(Exception):
    """A trained tensor lies in a layer that has no stacked twin, or one that does not keep examples apart."""


class _Stacked(nn.Module):
    """Keeps the plain layer it stands for, the values of all models by local name ([K, *shape]),
    and the examples that run now.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self._plain = (plain,)  # not a child: its parameters are not this module's
        self.values: dict[str, Tensor] = {}
        self.now: Examples | None = None

    def rows(self, *shape: int) -> Rows:
        assert self.now is not None
        return self.now.rows(*shape)

    @property
    def plain(self) -> Any:
        return self._plain[0]

    def get(self, name: str) -> Tensor | None:
        """The stacked values where they are trained, else None."""
        return self.values.get(name)


class _StackedSB(_Stacked):
    def forward(self, x: Tensor) -> Tensor:
        plain: SBLinear = self.plain
        flat = x.reshape(-1, x.shape[-1])
        y = SBProduct.apply(
            flat,
            plain.base.weight,
            plain.base.bias,
            plain.a,
            plain.b,
            self.values["core.weight"],
            self.rows(*x.shape[:-1]),
        )
        return y.view(*x.shape[:-1], -1)


class _StackedLoRA(_Stacked):
    def forward(self, x: Tensor) -> Tensor:
        plain: LoRALinear = self.plain
        flat = x.reshape(-1, x.shape[-1])
        rows = self.rows(*x.shape[:-1])
        up, down = self.values["up.weight"], self.get("down.weight")
        thin = (
            rows.gather(flat @ plain.down.weight.T)
            if down is None
            else rows.gather(flat) @ down.transpose(1, 2)
        )
        delta = rows.scatter(thin @ up.transpose(1, 2))
        return plain.base(x) + plain.scale * delta.view(*x.shape[:-1], -1)


class _StackedLinear(_Stacked):
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


class _StackedLayerNorm(_Stacked):
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


class _StackedConv2d(_Stacked):
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


class _StackedNorm2d(_Stacked):
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


class _StackedEmbedding(_Stacked):
    def forward(self, ids: Tensor) -> Tensor:
        weight, flat = self.values["weight"], ids.reshape(-1)
        places = self.rows(*ids.shape).owner * weight.shape[1] + flat
        return weight.flatten(0, 1).index_select(0, places).view(*ids.shape, -1)


_STACKED: Mapping[type[nn.Module], tuple[type[_Stacked], frozenset[str]]] = {
    SBLinear: (_StackedSB, frozenset({"core.weight"})),
    LoRALinear: (_StackedLoRA, frozenset({"up.weight", "down.weight"})),
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
        self._places: list[tuple[nn.Module, str, nn.Module, _Stacked]] = []
        self._values: dict[str, tuple[_Stacked, str]] = {}
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
