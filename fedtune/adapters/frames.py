"""Frames: the frozen A and B of Fed-SB, made once, on the coordinator, and shipped with a hash. NumPy only.

Devices never recompute them: signs and ties of an SVD differ between machines, and a core means nothing in
another frame. All frames of Fed-SB have orthonormal rows of A and columns of B, so that with scale 1 the
gradient of R is the best rank-r approximation of the gradient of W inside the frame (LoRA-SB, section 3).
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from fedtune.adapters.spec import AdapterSpec
from fedtune.common.seeds import generator
from fedtune.models.layout import Linear
from fedtune.types import Arrays


def from_matrices(
    spec: AdapterSpec, matrices: Iterable[tuple[Linear, np.ndarray]]
) -> tuple[Arrays, dict[str, np.ndarray]]:
    """The leading singular vectors of one matrix per linear.

    For M = U S Vᵀ [outputs, inputs]: B = U[:, :r], A = Vᵀ[:r], ordered by singular value, so that leading
    blocks of R nest. Signs are fixed (the largest entry of each column of B is positive), so equal input
    gives equal frames on one machine.

    Returns:
        (frame, singular values [r] by linear)
    """
    frame: Arrays = {}
    values: dict[str, np.ndarray] = {}
    for linear, matrix in matrices:
        u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        u, vt = u[:, : spec.rank], vt[: spec.rank]
        sign = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
        frame[f"{linear.name}.B"] = (u * sign).astype(np.float32)
        frame[f"{linear.name}.A"] = (vt * sign[:, None]).astype(np.float32)
        values[linear.name] = s[: spec.rank]
    return frame, values


def from_weights(spec: AdapterSpec, weight: Callable[[Linear], np.ndarray]) -> Arrays:
    """init = "weights": the SVD of each W (LoRA-XS's subspace without the singular values; data-free)."""
    return from_matrices(spec, ((linear, weight(linear)) for linear in spec.linears))[0]


def random_frame(spec: AdapterSpec, seed: int) -> Arrays:
    """init = "random": orthonormal by QR of Gaussian draws from the seed."""
    frame: Arrays = {}
    for t in spec.frame:
        tall = t.name.endswith(".B")
        rows, columns = t.shape if tall else t.shape[::-1]
        q, _ = np.linalg.qr(generator(seed, f"frame:{t.name}").standard_normal((rows, columns)))
        frame[t.name] = np.ascontiguousarray(q if tall else q.T).astype(np.float32)
    return frame


def from_gradients(
    spec: AdapterSpec, gradients: Mapping[str, np.ndarray], step: float
) -> tuple[Arrays, Arrays]:
    """init = "gradient" and "gradient-dp": the frame of the first optimizer step,
    and the cores to start from.

    Adam's first step is about -step·sign(G), so the SVD is of -sign(G) for the clients' mean gradient
    G = dL/dW (LoRA-SB, algorithm 1; Fed-SB averages before the sign, because sign(mean) is not mean(sign)).

    Args:
        gradients: mean gradient [outputs, inputs] by linear name.
        step: learning rate of that step; R starts at step·diag(S), or at 0 when 0.

    Returns:
        (frame, start): start has one core [r, r] per linear.
    """
    frame, values = from_matrices(spec, ((x, -np.sign(gradients[x.name])) for x in spec.linears))
    start = {f"{name}.R": np.diag(step * s / spec.scale).astype(np.float32) for name, s in values.items()}
    return frame, start
