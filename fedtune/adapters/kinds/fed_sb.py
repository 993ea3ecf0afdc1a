"""Fed-SB (Singhal et al. 2025): a core R [r, r] for each linear is trained in a frozen frame A, B."""

from collections.abc import Sequence

from fedtune.adapters import frames
from fedtune.adapters.kinds.method import AdapterMethod, Factors, Tensors, Weight
from fedtune.adapters.spec import AdapterSpec, factors, ranked_linears
from fedtune.models.layout import Layout
from fedtune.types import Arrays, TensorSpec


def _tensors(layout: Layout, targets: Sequence[str], rank: int) -> Tensors:
    linears = ranked_linears(layout, targets, rank, "fed-sb")
    return (
        linears,
        tuple(TensorSpec(f"{x.name}.R", (rank, rank), x.unit) for x in linears),
        factors(linears, rank),
    )


def _frame(spec: AdapterSpec, init: str, seed: int, weight: Weight) -> Arrays:
    return frames.random_frame(spec, seed) if init == "random" else frames.from_weights(spec, weight)


def _lora_factors(frame: Arrays, arrays: Arrays, linear: str) -> Factors:
    """The core is folded into B: (B·R, A)."""
    return frame[f"{linear}.B"] @ arrays[f"{linear}.R"], frame[f"{linear}.A"]


FED_SB = AdapterMethod(
    "fed-sb", _tensors, frame=_frame, lora_factors=_lora_factors, cores=True, gradient_frame=True
)
