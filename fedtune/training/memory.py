"""How much memory a training step needs, from shapes alone: the step is run on fake tensors, which hold no values."""

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fedtune.adapters.methods import attach
from fedtune.adapters.spec import AdapterSpec
from fedtune.job import Job
from fedtune.models.base import TunableModel, layout

NUMBER = 4
"""Bytes of a float32."""


def step_memory(job: Job, spec: AdapterSpec, sketch: TunableModel) -> dict[str, int | None]:
    """Bytes that one training client needs, part by part and in all: computed from shapes; libraries and data come on top.

    Args:
        sketch: the base on the meta device and without an adapter; it cannot be used afterwards.

    Returns:
        "activations" and "total" are None for a base whose code looks at values.
    """
    parameters = layout(sketch).size
    states = {"adamw": 2, "adam": 2, "sgd": 1 if job.federation.momentum else 0}[job.federation.optimizer]
    side = job.model.image_size if job.model.task == "image-classification" else job.model.max_length
    parts: dict[str, int | None] = {
        "base": NUMBER * (parameters + spec.head_size),
        "frame": NUMBER * sum(t.size for t in spec.frame),
        "adapter_gradients_optimizer": NUMBER * (2 + states) * spec.size,
        "activations": saved_bytes(sketch, spec, job.federation.batch_size, side),
    }
    known = [v for v in parts.values() if v is not None]
    return parts | {"total": sum(known) if len(known) == len(parts) else None}


def saved_bytes(model: TunableModel, spec: AdapterSpec, batch: int, side: int) -> int | None:
    """Bytes that autograd keeps between forward and backward of one step on a CPU, weights not counted.

    Args:
        model: on the meta device and without an adapter; it gets one and cannot be used afterwards.
        batch: examples in the step.
        side: tokens of each text, or pixels of an image's side.

    Returns:
        None for a base whose code looks at values and so cannot run without them.
    """
    with torch.device("meta"):
        attach(model, spec, {t.name: np.zeros(t.shape, np.float32) for t in spec.frame})
    with FakeTensorMode():
        _fake(model)
        held = {_key(t) for t in [*model.parameters(), *model.buffers()]}
        seen: dict[int, tuple[int, Tensor]] = {}  # the tensor is kept so that no later storage takes its address

        def pack(t: Tensor) -> Tensor:
            if _key(t) not in held:
                seen[_key(t)] = (t.untyped_storage().nbytes(), t)
            return t

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                _loss(model, batch, side)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            return None
    return sum(size for size, _ in seen.values())


def _fake(model: nn.Module) -> None:
    """Every tensor of the model as a fake one on the CPU: kernels are then chosen as a CPU would, which meta does not."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _loss(model: TunableModel, batch: int, side: int) -> Tensor:
    """Without an attention mask: code that looks into the mask cannot run so, and a full mask keeps the same tensors."""
    if model.task == "image-classification":
        logits = model(pixels=torch.empty(batch, 3, side, side))
    elif model.head is None:
        logits = model.body(input_ids=torch.zeros(batch, side, dtype=torch.long)).logits.flatten(0, 1)
    else:
        hidden = model.body(input_ids=torch.zeros(batch, side, dtype=torch.long)).last_hidden_state
        logits = model.head(hidden[:, 0] if model.pooling == "first" else hidden.mean(1))
    return nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata
