"""How much memory a training step needs, from shapes alone: the step is run on fake
tensors, which hold no values.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedtune.adapters.methods import attach
from fedtune.adapters.ranks import at_rank
from fedtune.adapters.spec import AdapterSpec
from fedtune.algorithms.units import AS_THE_JOB, Limits, lowest, most_numbers, unlimited
from fedtune.job import Job
from fedtune.models.base import TunableModel, layout
from fedtune.stateful.methods import method_of
from fedtune.training.lean import Lean

NUMBER = 4
"""Bytes of a float32."""


_CURVED = frozenset(
    {
        F.silu,
        F.gelu,
        F.hardswish,
        F.hardsigmoid,
        F.mish,
        F.elu,
        F.sigmoid,
        torch.sigmoid,
        Tensor.sigmoid,
        torch.tanh,
        Tensor.tanh,
        F.tanh,
    }
)
_PRODUCTS = frozenset({torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__})


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd keeps between forward and backward of one step on a CPU, weights not counted.

    `curved`: those of them that activations other than ReLU and its like keep (swish, h-swish, sigmoid), and
    the products with gates (squeeze-and-excitation).
    """

    bytes: int
    curved: int


def step_memory(
    job: Job, spec: AdapterSpec, sketch: TunableModel, limits: Limits = AS_THE_JOB
) -> dict[str, int | None]:
    """Bytes that one training client needs, part by part and in all: computed from shapes;
    libraries and data come on top.

    Args:
        sketch: the base on the meta device and without an adapter; it cannot be used afterwards.
        spec: at the job's rank.
        limits: of the client. Of blocks that differ from round to round, the most that any need; one that may
            not choose among all is not probed.

    Returns:
        "activations" and "total" are None for a base whose code looks at values. "curved" and
        "activations_without_lean" are no parts of the total: what of the activations ReLU6 would not keep
        (`Saved`), and what stock torch would keep.
    """
    parameters, spec = layout(sketch).size, at_rank(spec, limits.rank)
    states = {"adamw": 2, "adam": 2, "sgd": 1 if job.federation.momentum else 0}[job.federation.optimizer]
    side = job.model.max_length if sketch.task.inputs.has_length else job.model.image_size
    trained = {t.name for t in spec.schema.of_units(lowest(job, spec.schema, limits))}
    with torch.device("meta"):
        for name, p in attach(
            sketch, spec, {t.name: np.zeros(t.shape, np.float32) for t in spec.frame}
        ).items():
            p.requires_grad_(name in trained)
    backward = job.edge.mode == "backward"
    found, stock = (
        saved_bytes(sketch, job.federation.batch_size, side, lean) if backward else Saved(0, 0)
        for lean in (lean_of(job), "off")
    )
    parts: dict[str, int | None] = {
        "base": NUMBER * (parameters + spec.head_size),
        "frame": NUMBER * sum(t.size for t in spec.frame),
        "adapter_gradients_optimizer": NUMBER
        * (
            (1 + method_of(job).copies) * spec.size
            + max(
                (1 + states) * most_numbers(job, spec.schema, limits), _probe_numbers(job, spec, limits.depth)
            )
        ),
        "activations": None if found is None else found.bytes,
    }
    known = [v for v in parts.values() if v is not None]
    return parts | {
        "total": sum(known) if len(known) == len(parts) else None,
        "activations_without_lean": None if stock is None else stock.bytes,
        "curved": None if found is None else found.curved,
    }


def _probe_numbers(job: Job, spec: AdapterSpec, depth: int) -> int:
    """What a probe needs beside the trained numbers themselves: gradients of all blocks,
    and what it keeps of them.
    """
    found = (
        sum(t.size for t in spec.schema.of_units(spec.schema.blocks))
        if job.units.probes and unlimited(spec.schema, depth)
        else 0
    )
    score = job.units.chosen.score
    return (1 + (score.kept if score else 0)) * found


def lean_of(job: Job) -> str:
    """federation.lean as it counts: gradients by example are made from what stock torch keeps."""
    return "off" if job.privacy.unit == "example" else job.federation.lean


def saved_bytes(model: TunableModel, batch: int, side: int, lean: str) -> Saved | None:
    """From shapes alone.

    Args:
        model: on the meta device and with its adapter; what it holds is replaced,
            and it is good for nothing else afterwards.
        batch: examples in the step.
        side: tokens of each text, or pixels of an image's side.
        lean: as federation.lean.

    Returns:
        None for a base whose code looks at values and so cannot run without them.
    """
    with FakeTensorMode():
        _fake(model)
        held = {_key(t) for t in [*model.parameters(), *model.buffers()]}
        # the tensor is kept so that no later storage takes its address
        seen: dict[int, tuple[int, Tensor, bool]] = {}
        calls = _Calls()

        def pack(t: Tensor) -> Tensor:
            if _key(t) not in held:
                seen.setdefault(_key(t), (t.untyped_storage().nbytes(), t, calls.curved))
            return t

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), ExitStack() as around:
                if lean != "off":
                    around.enter_context(Lean(model, lean == "exact").running())
                around.enter_context(calls)
                _loss(model, batch, side)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            return None
    return Saved(
        sum(size for size, _, _ in seen.values()), sum(size for size, _, curved in seen.values() if curved)
    )


class _Calls(TorchFunctionMode):
    """Watches which function runs: `curved` is whether it is an activation that is not made of straight
    pieces, or a product of two results.
    """

    curved = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, gate = (
            self.curved,
            func in _PRODUCTS and all(isinstance(x, Tensor) and x.requires_grad for x in args[:2]),
        )
        self.curved = func in _CURVED or gate
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.curved = before


def _fake(model: nn.Module) -> None:
    """Every tensor of the model as a fake one on the CPU: kernels are then chosen as a CPU
    would, which meta does not.
    """
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad
                )
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _loss(model: TunableModel, batch: int, side: int) -> Tensor:
    """Without an attention mask: code that looks into the mask cannot run so,
    and a full mask keeps the same tensors.
    """
    if not model.task.inputs.has_length:
        logits = model(pixels=torch.empty(batch, 3, side, side))
    elif model.head is None:
        logits = model.body(input_ids=torch.zeros(batch, side, dtype=torch.long)).logits.flatten(0, 1)
    else:
        hidden = model.body(input_ids=torch.zeros(batch, side, dtype=torch.long)).last_hidden_state
        logits = model.head(hidden[:, 0] if model.pooling == "first" else hidden.mean(1))
    return nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata
