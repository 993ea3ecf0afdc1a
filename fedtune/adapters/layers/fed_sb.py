"""Fed-SB: y = W x + s·B·R·A·x with only the core R [r, r] trained; A [r,
inputs] and B [outputs, r] are a frozen frame.

Sources: Fed-SB (Singhal et al. 2025), LoRA-SB and LoRA-XS; the maths is in the first
two functions' docstrings.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.adapters.layers.attachment import Attachment, replace_linear
from fedtune.adapters.layers.stacked import Rows, Stacked
from fedtune.adapters.spec import AdapterSpec
from fedtune.models.base import TunableModel
from fedtune.types import Arrays


class SBLinear(nn.Module):
    """A frozen linear with a core beside it. Input [..., inputs], output [..., outputs].

    The core is a plain bias-free nn.Linear, so that per-example gradient tools see a layer they know.
    """

    a: Tensor
    b: Tensor

    def __init__(self, base: nn.Linear, a: np.ndarray, b: np.ndarray, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.register_buffer("a", torch.from_numpy(np.array(a, np.float32)))
        self.register_buffer("b", torch.from_numpy(np.array(b, np.float32) * np.float32(scale)))
        self.core = nn.Linear(a.shape[0], a.shape[0], bias=False)
        nn.init.zeros_(self.core.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(self.core(F.linear(x, self.a)), self.b)


class Leading:
    """A model as a client of a lower rank has it: the leading rows of each A, columns of each B, and cores
    [rank, rank] of its own, which begin at 0.

    Args:
        model: with its adapter on it; changed only while `installed`.
        parameters: what is trained, by name, at the adapter's rank.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], rank: int) -> None:
        self.parameters, self._layers = dict(parameters), list[tuple[SBLinear, dict[str, Any]]]()
        names = {id(p): name for name, p in parameters.items()}
        for layer in [m for m in model.modules() if isinstance(m, SBLinear)]:
            core = nn.Linear(rank, rank, bias=False, device=layer.a.device)
            nn.init.zeros_(core.weight)
            self.parameters[names[id(layer.core.weight)]] = core.weight
            self._layers.append((layer, {"a": layer.a[:rank], "b": layer.b[:, :rank], "core": core}))

    @contextmanager
    def installed(self) -> Iterator[dict[str, Tensor]]:
        """Inside, the model computes so, with the parameters that are given; outside it is as it was."""
        before = [(layer, {name: getattr(layer, name) for name in own}) for layer, own in self._layers]
        try:
            _set(self._layers)
            yield self.parameters
        finally:
            _set(before)


def _set(layers: list[tuple[SBLinear, dict[str, Any]]]) -> None:
    for layer, values in layers:
        for name, value in values.items():
            setattr(layer, name, value)


class SBProduct(torch.autograd.Function):
    """x W' + bias + (x A') R' B' with gradients to x, bias and R alone,
    in as few passes over the wide side as there are products.

    x [n, inputs], W [outputs, inputs], A [r, inputs], B [outputs, r] with the scale in it. R is [r,
    r] without `rows`; with them each of K models has its own, [K, r, r], and row i is multiplied by
    that of its model. Kept for the backward pass: x A'. dR = (dy B)' (x A'), summed over a model's
    rows; dx = dy W + (dy B R) A.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        r: Tensor,
        rows: Rows | None = None,
    ) -> Tensor:
        down = x @ a.T if rows is None else rows.gather(x @ a.T)
        ctx.save_for_backward(down, weight, a, b, r)
        ctx.rows = rows
        thin = down @ r.mT
        return F.linear(x, weight, bias).addmm_(thin if rows is None else rows.scatter(thin), b.T)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,), rows = grads, ctx.rows
        down, weight, a, b, r = ctx.saved_tensors
        up = dy @ b if rows is None else rows.gather(dy @ b)
        dr = up.mT @ down if ctx.needs_input_grad[5] else None
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, None, dbias, None, None, dr, None
        thin = up @ r
        return (
            (dy @ weight).addmm_(thin if rows is None else rows.scatter(thin), a),
            None,
            dbias,
            None,
            None,
            dr,
            None,
        )


class StackedSB(Stacked):
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


def _lean(layer: SBLinear, x: Tensor) -> Tensor:
    if not layer.core.weight.requires_grad:  # this round: then stock torch keeps nothing either
        return type(layer).forward(layer, x)
    flat = x.reshape(-1, x.shape[-1])
    return SBProduct.apply(
        flat, layer.base.weight, layer.base.bias, layer.a, layer.b, layer.core.weight
    ).view(*x.shape[:-1], -1)


def _attach(model: TunableModel, spec: AdapterSpec, frame: Arrays) -> Mapping[str, Tensor]:
    parameters: dict[str, Tensor] = {}
    for linear in spec.linears:
        new = SBLinear(
            model.linear(linear.name), frame[f"{linear.name}.A"], frame[f"{linear.name}.B"], spec.scale
        )
        replace_linear(model, linear.name, new)
        parameters[f"{linear.name}.R"] = new.core.weight
    return parameters


ATTACHMENT = Attachment(
    _attach, stacked={SBLinear: (StackedSB, frozenset({"core.weight"}))}, lean={SBLinear: _lean}
)
