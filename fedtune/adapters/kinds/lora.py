"""LoRA (Hu et al. 2021, arXiv:2106.09685), and FFA-LoRA (Sun et al. 2024, arXiv:2403.12313): A is drawn once
and stays, B is trained from 0, so that the mean over clients is exact.
"""

from collections.abc import Sequence

import numpy as np

from fedtune.adapters.kinds.method import AdapterMethod, Factors, Tensors, Weight
from fedtune.adapters.spec import AdapterSpec, factors, ranked_linears
from fedtune.common.seeds import generator
from fedtune.models.layout import Layout
from fedtune.types import Arrays


def _tensors(layout: Layout, targets: Sequence[str], rank: int) -> Tensors:
    linears = ranked_linears(layout, targets, rank, "lora")
    return linears, factors(linears, rank), ()


def _ffa_tensors(layout: Layout, targets: Sequence[str], rank: int) -> Tensors:
    linears = ranked_linears(layout, targets, rank, "ffa-lora")
    frame, trained = (
        tuple(t for t in factors(linears, rank) if t.name.endswith(end)) for end in (".A", ".B")
    )
    return linears, trained, frame


def lora_factor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A [r, inputs] ~ uniform(±1/sqrt(inputs)), as Kaiming's with a = sqrt(5) (Hu et al. 2021,
    arXiv:2106.09685, section 4.1).
    """
    return generator(seed, f"lora:{name}").uniform(-1, 1, shape).astype(np.float32) / np.sqrt(
        shape[1], dtype=np.float32
    )


def _start(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.zeros(shape, np.float32) if name.endswith(".B") else lora_factor(name, shape, seed)


def _ffa_frame(spec: AdapterSpec, init: str, seed: int, weight: Weight) -> Arrays:
    """The A of FFA-LoRA, as LoRA would start it."""
    return {t.name: lora_factor(t.name, t.shape, seed) for t in spec.frame}


def _lora_factors(frame: Arrays, arrays: Arrays, linear: str) -> Factors:
    return arrays[f"{linear}.B"], arrays[f"{linear}.A"]


def _ffa_factors(frame: Arrays, arrays: Arrays, linear: str) -> Factors:
    return arrays[f"{linear}.B"], frame[f"{linear}.A"]


LORA = AdapterMethod("lora", _tensors, start=_start, lora_factors=_lora_factors)
FFA_LORA = AdapterMethod("ffa-lora", _ffa_tensors, frame=_ffa_frame, lora_factors=_ffa_factors)
