"""What the code outside this folder may ask of an adapter method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.adapters.spec import AdapterSpec
from fedtune.models.layout import Layout, Linear
from fedtune.types import Arrays, TensorSpec

Tensors = tuple[tuple[Linear, ...], tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
"""The linears a method adapts, what it trains, and what it keeps frozen beside the base."""
Weight = Callable[[Linear], np.ndarray]
"""Reads the weight [outputs, inputs] of a linear of the base."""
Factors = tuple[np.ndarray, np.ndarray]
"""(B, A) with update = scale·B·A, B [outputs, r], A [r, inputs]."""


def zeros(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def no_frame(spec: AdapterSpec, init: str, seed: int, weight: Weight) -> Arrays:
    return {}


@dataclass(frozen=True)
class AdapterMethod:
    """An adapter method without its torch modules.

    Args:
        name: in jobs, manifests and exports.
        tensors: of a base, the job's targets and its rank; without the task head.
        start: round 0 of a tensor that the base does not have, from its name, shape and the seed.
        frame: the frozen tensors that need no data, from the spec, adapter.init, the seed and the weights.
        lora_factors: of a linear, from the frame and the trained values. None: no LoRA holds what is trained.
        no_lora: says so to users; empty where there are factors.
        cores: trains a core LINEAR.R [r, r] for each linear, whose leading blocks are those of lower ranks
            (`adapters.ranks`).
        gradient_frame: the frame can be made from gradients of the first step.
        head_only: trains nothing but the task head.
        biases_only: trains nothing but biases, beside the task head.
    """

    name: str
    tensors: Callable[[Layout, Sequence[str], int], Tensors]
    start: Callable[[str, tuple[int, ...], int], np.ndarray] = zeros
    frame: Callable[[AdapterSpec, str, int, Weight], Arrays] = no_frame
    lora_factors: Callable[[Arrays, Arrays, str], Factors] | None = None
    no_lora: str = ""
    cores: bool = False
    gradient_frame: bool = False
    head_only: bool = False
    biases_only: bool = False
