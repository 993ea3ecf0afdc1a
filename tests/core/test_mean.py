"""Averaging: exact on cores, per tensor over its owners, streaming."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.aggregation.mean import weighted_mean
from fedtune.errors import EmptyCohort, ShapeMismatch
from fedtune.types import Update


def update(client, weight, **arrays):
    return Update(client, 1, {n: np.asarray(a, np.float32) for n, a in arrays.items()}, weight)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 6), st.lists(st.floats(0.1, 1e4), min_size=1, max_size=6))
def test_mean_of_products_is_product_of_mean(seed, r, extra, weights):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((r, r + extra)), rng.standard_normal((r + 2 * extra, r))
    cores = [rng.standard_normal((r, r)).astype(np.float32) for _ in weights]
    mean = weighted_mean((update(str(i), w, R=c) for i, (w, c) in enumerate(zip(weights, cores))), {"R": np.zeros((r, r), np.float32)})
    direct = sum(w * (b @ c @ a) for w, c in zip(weights, cores)) / sum(weights)
    np.testing.assert_allclose(b @ mean.arrays["R"] @ a, direct, atol=1e-5 * r)


def test_tensors_are_averaged_over_those_that_hold_them():
    reference = {n: np.full(2, 9, np.float32) for n in "xyz"}
    mean = weighted_mean([update("a", 1, x=[0, 0], y=[1, 1]), update("b", 3, x=[4, 4])], reference)
    assert mean.arrays["x"].tolist() == [3, 3] and mean.arrays["y"].tolist() == [1, 1] and mean.arrays["z"].tolist() == [9, 9]
    assert mean.clients == ("a", "b") and mean.weight == 4


def test_equal_weights_and_untouched_inputs():
    one, two = update("a", 1, x=[0.0]), update("b", 99, x=[1.0])
    assert weighted_mean([one, two], {"x": np.zeros(1, np.float32)}, equal=True).arrays["x"].tolist() == [0.5]
    assert one.arrays["x"].tolist() == [0.0] and two.arrays["x"].tolist() == [1.0]


def test_nothing_to_average_and_wrong_shapes_raise():
    with pytest.raises(EmptyCohort):
        weighted_mean([], {"x": np.zeros(1, np.float32)})
    with pytest.raises(EmptyCohort):
        weighted_mean([update("a", 0, x=[1.0])], {"x": np.zeros(1, np.float32)})
    with pytest.raises(ShapeMismatch, match="client 'a', tensor 'x'"):
        weighted_mean([update("a", 1, x=[1.0, 2.0])], {"x": np.zeros(1, np.float32)})
