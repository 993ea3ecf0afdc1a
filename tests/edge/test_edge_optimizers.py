"""The optimizers of a device without torch beside torch.optim."""

import numpy as np
import pytest
import torch

from fedtune.adapters.spec import AdapterSpec
from fedtune.edge.optimizers import Optimizer
from fedtune.job import parse_job
from fedtune.training.local import make_optimizer
from fedtune.types import TensorSpec

TENSORS = (
    TensorSpec("a.R", (4, 4), "block.0"),
    TensorSpec("b.R", (3,), "block.1"),
    TensorSpec("head.weight", (2, 5), "head"),
)
SPEC = AdapterSpec("fed-sb", 4, 1.0, (), TENSORS, ())


@pytest.mark.parametrize(
    "changes",
    [
        ("federation.optimizer=sgd",),
        ("federation.optimizer=sgd", "federation.momentum=0.9"),
        ("federation.optimizer=sgd", "federation.momentum=0.9", "federation.weight-decay=0.1"),
        ("federation.optimizer=adamw",),
        ("federation.optimizer=adam", "federation.weight-decay=0.1"),
        ("federation.optimizer=adamw", "federation.weight-decay=0.1", "federation.head-lr=0.05"),
        ("federation.optimizer=sgd", "federation.head-lr=0.05", "federation.lr-decay=0.5"),
    ],
    ids=" ".join,
)
def test_equal_to_torch(changes):
    """30 steps with gradients over many decades. float32 rounds to 6e-8 of a value;
    a few roundings a step add up.
    """
    settings, draw = parse_job("", changes).federation, np.random.default_rng(0)
    start = draw.standard_normal(29).astype(np.float32)
    parameters = {
        t.name: torch.from_numpy(part.reshape(t.shape).copy()).requires_grad_()
        for t, part in zip(TENSORS, np.split(start, [16, 19]))
    }
    theirs, ours, values = make_optimizer(parameters, settings, 3), Optimizer(SPEC, settings, 3), start.copy()
    for _ in range(30):
        gradient = (draw.standard_normal(29) * 10.0 ** draw.uniform(-6, 2, 29)).astype(np.float32)
        kept = gradient.copy()
        for p, part in zip(parameters.values(), np.split(gradient, [16, 19])):
            p.grad = torch.from_numpy(part.reshape(p.shape).copy())
        theirs.step()
        ours.step(values, gradient)
        assert np.array_equal(gradient, kept)
    expected = np.concatenate([p.detach().numpy().ravel() for p in parameters.values()])
    np.testing.assert_allclose(values, expected, rtol=3e-6, atol=3e-7 * np.abs(expected - start).max())
    assert np.abs(values - start).max() > 1e-3 and values.dtype == np.float32
