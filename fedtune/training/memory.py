"""How much memory a training step needs, from shapes alone: the step is run on the meta device, which computes nothing."""

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.adapters.methods import attach
from fedtune.adapters.spec import AdapterSpec
from fedtune.models.base import TunableModel


def saved_bytes(model: TunableModel, spec: AdapterSpec, batch: int, side: int) -> int | None:
    """Bytes that autograd keeps between forward and backward of one step, weights not counted.

    Args:
        model: on the meta device and without an adapter; it gets one.
        batch: examples in the step.
        side: tokens of each text, or pixels of an image's side.

    Returns:
        None for a base whose code looks at values and so cannot run without them.
    """
    with torch.device("meta"):
        attach(model, spec, {t.name: np.zeros(t.shape, np.float32) for t in spec.frame})
        model.to("meta")
        held = {_key(t) for t in [*model.parameters(), *model.buffers()]}
        seen: dict[int, tuple[int, Tensor]] = {}  # the tensor is kept so that no later storage takes its address

        def pack(t: Tensor) -> Tensor:
            if _key(t) not in held:
                seen[_key(t)] = (t.untyped_storage().nbytes(), t)
            return t

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                _loss(model, batch, side)
        except (RuntimeError, NotImplementedError):
            return None
    return sum(size for size, _ in seen.values())


def _loss(model: TunableModel, batch: int, side: int) -> Tensor:
    """Without an attention mask: code that looks into the mask cannot run on meta, and a full mask keeps the same tensors."""
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
