"""Puts an adapter on a model: from a spec and a frame to the parameters that are trained, by tensor name.

Needs torch.
"""

import numpy as np
import torch
from torch import Tensor

from fedtune.adapters.kinds.table import METHODS
from fedtune.adapters.layers import fed_sb, lite_residual, lora, own
from fedtune.adapters.layers.attachment import Attachment
from fedtune.adapters.spec import AdapterSpec
from fedtune.errors import ShapeMismatch
from fedtune.models.base import TunableModel
from fedtune.types import Arrays

Parameters = dict[str, Tensor]


def attach(model: TunableModel, spec: AdapterSpec, frame: Arrays) -> Parameters:
    """Changes `model` in place so that it holds the adapter; everything else stays frozen.

    Returns the trainable parameters by the names of `spec.trainable`, in that order. The model's output is
    unchanged until values are written.

    Raises ShapeMismatch when the frame is not the one `spec` describes.
    """
    for t in spec.frame:
        if t.name not in frame or frame[t.name].shape != t.shape:
            raise ShapeMismatch(
                f"frame tensor {t.name!r}: "
                f"{frame[t.name].shape if t.name in frame else 'missing'}, expected {t.shape}"
            )
    model.requires_grad_(False)
    parameters = dict(ATTACHMENTS[spec.method].attach(model, spec, frame))
    if model.head is not None:
        parameters |= {f"head.{name}": p for name, p in model.head.named_parameters()}
    chosen = {t.name: parameters[t.name] for t in spec.trainable}
    for p in chosen.values():
        p.requires_grad_(True)
    return chosen


def read(parameters: Parameters) -> Arrays:
    """Values as float32 arrays of their own."""
    return {name: p.detach().cpu().numpy().astype(np.float32, copy=True) for name, p in parameters.items()}


def write(parameters: Parameters, arrays: Arrays) -> None:
    """Overwrites the parameters named in `arrays`."""
    with torch.no_grad():
        for name, array in arrays.items():
            parameters[name].copy_(torch.from_numpy(array))


def initial(model: TunableModel, spec: AdapterSpec, start: Arrays, seed: int) -> Arrays:
    """Round 0: `start` where it says (a gradient init's cores), else the method's own start,
    else the base's own values.
    """
    base = dict(model.body.named_parameters()) | {
        f"head.{n}": p for n, p in (model.head.named_parameters() if model.head is not None else ())
    }
    arrays: Arrays = {}
    draw = METHODS[spec.method].start
    for t in spec.trainable:
        if t.name in start:
            arrays[t.name] = start[t.name]
        elif t.name in base:
            arrays[t.name] = base[t.name].detach().numpy().astype(np.float32, copy=True)
        else:
            arrays[t.name] = draw(t.name, t.shape, seed)
    return arrays


def merge(model: TunableModel, spec: AdapterSpec, frame: Arrays, arrays: Arrays) -> None:
    """Folds trained values into an un-adapted model's own weights: W + s·B·R·A, W + s·B·A, or the values
    themselves. Lite residuals stay beside it.
    """
    ATTACHMENTS[spec.method].insert(model)
    weights = dict(model.body.named_parameters()) | {
        f"head.{n}": p for n, p in (model.head.named_parameters() if model.head is not None else ())
    }
    factors = METHODS[spec.method].lora_factors
    with torch.no_grad():
        if factors is not None:
            for linear in spec.linears:
                b, a = factors(frame, arrays, linear.name)
                delta = spec.scale * (b.astype(np.float64) @ a.astype(np.float64))
                weights[f"{linear.name}.weight"].add_(torch.from_numpy(delta.astype(np.float32)))
        for name, array in arrays.items():
            if name in weights:
                weights[name].copy_(torch.from_numpy(array))


ATTACHMENTS: dict[str, Attachment] = {
    "fed-sb": fed_sb.ATTACHMENT,
    "lora": lora.ATTACHMENT,
    "ffa-lora": lora.ATTACHMENT,
    "bias": own.ATTACHMENT,
    "tinytl": lite_residual.ATTACHMENT,
    "head": own.ATTACHMENT,
    "full": own.ATTACHMENT,
}
"""The torch half of each method of `kinds.table.METHODS`."""

STACKED = {module: twin for half in ATTACHMENTS.values() for module, twin in half.stacked.items()}
LEAN = {module: forward for half in ATTACHMENTS.values() for module, forward in half.lean.items()}
