"""A training step that keeps as little for its backward pass as the maths allows (TinyTL, Cai et al. 2020,
arXiv:2007.11622, section 3.1).

Stock autograd keeps the input of a convolution, a norm or a pooling even where nothing in it is trained.
While `Lean.running`, calls of the functions in `lean_functions.ALL` go to twins that keep less; which module
calls them, and how it is written, makes no difference:

    what                         stock keeps             here                     gradients against stock
    convolution, frozen kernel   its input               nothing                  equal, bit for bit
    norm with frozen statistics  its input               nothing                  equal, bit for bit
    ReLU, ReLU6                  a float32 per value     one bit per value        equal, bit for bit
    average pooling              its input               its shape                equal, bit for bit
    layer norm, frozen scale     its input               its output, which the    float32 rounding
                                                         attention needs as well
    GELU, SiLU, hard-swish       a float32 per value     the slope in 16 bits     slope within SLOPE_ERROR
    self-attention               q, k, v and the result  its input                float32 rounding
                                                                                  (made again in backward)

Frozen linears, sums, biases and bilinear scaling keep nothing in stock torch either. Slopes have 16 bits and
not 8: 8 make gradients wrong by 1e-3, which shows after a round of Adam, and save only a byte more. Making
the middle of an MLP again instead would save both bytes and cost a linear of its size; what is made again
here are only the three linears of an attention. `exact` leaves out the last three rows.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedtune.adapters.methods import LEAN
from fedtune.training.lean_functions import ALL, EXACT

Forward = Callable[..., Any]


class Lean:
    """Runs steps of a model leanly.

    Made once for a model with its adapter on it; the model is changed only while it runs.
    """

    def __init__(self, model: nn.Module, exact: bool = False) -> None:
        """`exact`: only that of the table whose gradients are equal bit for bit,
        so that a run is the same with it and without.
        """
        self.twins = EXACT if exact else ALL
        self.unread = False
        """Whether an attention is being made again whose result nobody reads."""
        self.attended: Tensor | None = None
        """The result of the attention that ran last."""
        adapters: dict[nn.Module, Forward] = {
            m: partial(LEAN[type(m)], m) for m in model.modules() if type(m) in LEAN and not exact
        }
        attentions: dict[nn.Module, Forward] = {
            m: partial(_made_again, self, m, m.forward)
            for m in model.modules()
            if is_self_attention(m) and not exact
        }
        self._forwards = adapters | attentions
        self._inside = {m: {own: adapters[own] for own in m.modules() if own in adapters} for m in attentions}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the forward pass is lean; its backward pass may run inside or after."""
        with self._swapped(self._forwards):
            yield

    @contextmanager
    def making_again(self, module: nn.Module, unread: bool) -> Iterator[None]:
        """Around the second run of an attention.

        `unread`: nothing behind the attention's products reads their result.
        """
        with self._swapped(self._inside[module]):
            self.unread = unread
            try:
                yield
            finally:
                self.unread = False

    @contextmanager
    def _swapped(self, forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
        before = {module: module.__dict__.get("forward") for module in forwards}
        try:
            for module, forward in forwards.items():
                module.__dict__["forward"] = forward
            with _Functions(self):
                yield
        finally:
            for module, own in before.items():
                del module.__dict__["forward"]
                if own is not None:
                    module.__dict__["forward"] = own


def is_self_attention(module: nn.Module) -> bool:
    """By structure: at least three linear maps of the same input among its children,
    and no more than one other.
    """
    widths = [_inputs(child) for child in module.children()]
    known = [w for w in widths if w is not None]
    return any(known.count(w) >= 3 for w in set(known)) and len(known) <= 4


def _inputs(module: nn.Module) -> int | None:
    """Width that a linear map reads, also with an adapter around it; None for anything else."""
    plain = getattr(module, "base", module)
    return plain.in_features if isinstance(plain, nn.Linear) else None


class _Functions(TorchFunctionMode):
    """Sends calls of torch functions to their lean twins."""

    def __init__(self, lean: Lean) -> None:
        super().__init__()
        self.lean = lean

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        twin = self.lean.twins.get(func) if torch.is_grad_enabled() else None
        if func is F.scaled_dot_product_attention and (twin is None or not self.lean.unread):
            self.lean.attended = func(*args, **kwargs)
            return self.lean.attended
        found = None if twin is None else twin(*args, **kwargs)
        return func(*args, **kwargs) if found is None else found


def _made_again(lean: Lean, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """An attention's forward, of which autograd keeps the inputs alone."""
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    trained = [p for p in module.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not (trained or any(t.requires_grad for t in tensors.values())):
        return forward(*args, **kwargs)

    def run(*values: Tensor) -> Any:
        given = named | dict(zip(tensors, values))
        return forward(*(given[i] for i in range(len(args))), **{name: given[name] for name in kwargs})

    whole: list[Any] = []
    first = _MadeAgain.apply(lean, module, run, whole, len(tensors), *tensors.values(), *trained)
    return (first, *whole[0][1:]) if isinstance(whole[0], tuple) else first


class _MadeAgain(torch.autograd.Function):
    """Runs something twice: now without keeping anything, and in the backward pass again for the gradients.

    Only its first result has gradients. All it returned now is put into `whole`.
    """

    @staticmethod
    def forward(
        ctx: Any, lean: Lean, module: nn.Module, run: Forward, whole: list[Any], inputs: int, *values: Tensor
    ) -> Tensor:
        out = run(*values[:inputs])
        whole.append(out)
        ctx.save_for_backward(*values)
        ctx.lean, ctx.module, ctx.run, ctx.inputs = lean, module, run, inputs
        first = _first(out)
        # else a linear, or something else, reads it
        ctx.unread = lean.attended is not None and _same_memory(first, lean.attended)
        lean.attended = None
        return first

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        values = ctx.saved_tensors
        fresh = [v.detach().requires_grad_(v.requires_grad) for v in values[: ctx.inputs]]
        all_values = (*fresh, *values[ctx.inputs :])
        with torch.enable_grad(), ctx.lean.making_again(ctx.module, ctx.unread):
            first = _first(ctx.run(*fresh))
        ctx.lean.attended = None
        found = iter(
            torch.autograd.grad(
                first, [v for v in all_values if v.requires_grad], grads[0], allow_unused=True
            )
        )
        return *([None] * 5), *(next(found) if v.requires_grad else None for v in all_values)


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
