"""Frames: orthonormal, in the order of singular values, the same every time,
and of the gradient's sign for init = gradient.
"""

import numpy as np
import pytest

from fedtune.adapters import frames
from fedtune.adapters.describe import describe
from fedtune.job import AdapterSection
from fedtune.models.layout import Layout, Linear
from fedtune.types import TensorSpec

LINEARS = (Linear("b.0.up", "up", 12, 7, "block.0"), Linear("b.0.down", "down", 7, 12, "block.0"))
LAYOUT = Layout(
    LINEARS, tuple(TensorSpec(f"{x.name}.weight", (x.outputs, x.inputs), x.unit) for x in LINEARS), ()
)
SPEC = describe(LAYOUT, AdapterSection(rank=4))


def matrices(seed):
    rng = np.random.default_rng(seed)
    return {x.name: rng.standard_normal((x.outputs, x.inputs)).astype(np.float32) for x in LINEARS}


def orthonormal(frame):
    for x in LINEARS:
        a, b = frame[f"{x.name}.A"], frame[f"{x.name}.B"]
        np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-5)
        np.testing.assert_allclose(b.T @ b, np.eye(4), atol=1e-5)


def test_weight_frame_holds_the_best_rank_r_approximation():
    weights = matrices(0)
    frame = frames.from_weights(SPEC, lambda x: weights[x.name])
    orthonormal(frame)
    for x in LINEARS:
        a, b, w = frame[f"{x.name}.A"], frame[f"{x.name}.B"], weights[x.name]
        core = b.T @ w @ a.T
        s = np.linalg.svd(w, compute_uv=False)
        np.testing.assert_allclose(core, np.diag(s[:4]), atol=1e-4)  # leading blocks nest, largest first
        # Eckart-Young
        assert np.linalg.norm(w - b @ core @ a) == pytest.approx(np.linalg.norm(s[4:]), rel=1e-4)


def test_signs_do_not_depend_on_the_solver():
    weights = matrices(1)
    frame = frames.from_weights(SPEC, lambda x: weights[x.name])
    for x in LINEARS:
        b = frame[f"{x.name}.B"]
        assert (b[np.abs(b).argmax(0), np.arange(4)] > 0).all()
    again = frames.from_weights(SPEC, lambda x: weights[x.name].copy())
    assert all(np.array_equal(frame[name], again[name]) for name in frame)


def test_random_frames_come_from_the_seed():
    one, two, other = frames.random_frame(SPEC, 3), frames.random_frame(SPEC, 3), frames.random_frame(SPEC, 4)
    orthonormal(one)
    assert all(np.array_equal(one[n], two[n]) and not np.array_equal(one[n], other[n]) for n in one)


def test_gradient_frame_spans_the_first_sign_step():
    gradients = matrices(2)
    step = 0.01
    frame, start = frames.from_gradients(SPEC, gradients, step)
    orthonormal(frame)
    for x in LINEARS:
        u, s, vt = np.linalg.svd(-np.sign(gradients[x.name]))
        wanted = step * (u[:, :4] * s[:4]) @ vt[:4]  # the best rank-4 form of an Adam step of this size
        np.testing.assert_allclose(
            frame[f"{x.name}.B"] @ start[f"{x.name}.R"] @ frame[f"{x.name}.A"], wanted, atol=1e-5
        )
    _, at_zero = frames.from_gradients(SPEC, gradients, 0.0)
    assert all(not r.any() for r in at_zero.values())
