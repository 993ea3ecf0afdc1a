"""Runs graphs beside the model they come from and says how far apart they are.
numpy and onnxruntime, no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from fedtune.errors import ModelError
from fedtune.tasks.base import UNLABELLED
from fedtune.types import Arrays

_ERRORS_ONLY = 3


@dataclass(frozen=True)
class Check:
    """One batch to compare on.

    Attributes:
        inputs: what the graph takes.
        rows: bool over the leading axes of its logits, [n] or [n, length]:
            the k predictions that count (padding does not).
        reference: float32 [k, classes], the right logits.
        targets: int64 [k], the true class, or UNLABELLED.
    """

    inputs: Arrays
    rows: np.ndarray
    reference: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """How a graph compares with its reference: largest absolute difference of logits,
    share of equal labels, accuracy.

    `label_agreement` is NaN without predictions, `accuracy` without targets.
    """

    max_difference: float
    label_agreement: float
    accuracy: float


def open_graph(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """A session on the CPU; `threads` 0 leaves their number to onnxruntime.

    Raises ModelError for a file that is no graph.
    """
    return open_session(path, onnxruntime.SessionOptions(), threads, "export the run again")


def open_session(
    path: Path, options: onnxruntime.SessionOptions, threads: int, remedy: str, without: Sequence[str] = ()
) -> onnxruntime.InferenceSession:
    """As `open_graph`, with these options and without onnxruntime's optimizers of these names."""
    options.log_severity_level, options.intra_op_num_threads = _ERRORS_ONLY, threads
    try:
        return onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=[*without]
        )
    except Exception as e:  # onnxruntime's errors have no base of their own
        reason = (str(e).strip().splitlines() or [""])[0][:160]
        raise ModelError(f"{path}: onnxruntime cannot open it ({reason}); {remedy}") from None


def compare(
    graphs: Mapping[str, Path], checks: Iterable[Check], threads: int = 0, more: Mapping[str, Arrays] = {}
) -> dict[str, Agreement]:
    """Runs every graph over the same batches, which are read once and not kept. more: what a graph takes
    beside them, by its name here.
    """
    sessions = {name: open_graph(path, threads) for name, path in graphs.items()}
    largest = dict.fromkeys(graphs, 0.0)
    sums = {name: np.zeros(4) for name in graphs}
    for check in checks:
        for name, session in sessions.items():
            logits = session.run(["logits"], {**check.inputs, **more.get(name, {})})[0][check.rows]
            # np.maximum and not max: a NaN must stay
            largest[name] = float(
                np.maximum(largest[name], np.abs(logits - check.reference).max(initial=0.0))
            )
            sums[name] += _counts(logits, check)
    return {
        name: Agreement(largest[name], _share(s[0], s[1]), _share(s[2], s[3])) for name, s in sums.items()
    }


def require_equal(found: Agreement, limit: float, name: str) -> None:
    """Raise ModelError when the float32 graph is further from torch than the job allows.

    NaN is further than any limit.
    """
    if not found.max_difference <= limit:
        raise ModelError(
            f"{name}: its logits differ from torch by {found.max_difference:.3g}, export.max-difference "
            f"is {limit:g}; nothing was written. Raise the limit or leave ONNX out with export.onnx = false"
        )


def reason_against(found: Agreement, least: float) -> str:
    """Why an int8 graph must not be used, "" where it may: NaN logits,
    or too few labels as the float model has them.
    """
    if not np.isfinite(found.max_difference):
        return "its logits are not finite"
    if not found.label_agreement >= least:
        return (
            f"it agrees with the float model on {found.label_agreement:.1%} of labels, "
            f"export.min-agreement asks for {least:.1%}"
        )
    return ""


def _counts(logits: np.ndarray, check: Check) -> np.ndarray:
    """float64 [4]: equal labels, predictions, right labels, predictions that have a target."""
    labels, known = logits.argmax(-1), check.targets != UNLABELLED
    equal, right = labels == check.reference.argmax(-1), (labels == check.targets) & known
    return np.array([equal.sum(), len(labels), right.sum(), known.sum()], dtype=np.float64)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
