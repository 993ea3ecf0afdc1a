"""Floats to integers and back: unbiased, within a step, never around the corner;
and means over those who trained.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import Refused, ShapeMismatch
from fedtune.secagg.masks import sum_plainly
from fedtune.secagg.quantise import Grid, dequantise, headroom, quantise
from fedtune.secagg.terms import Terms
from fedtune.secagg.vectors import length, means, pack, unpack
from fedtune.types import TensorSpec
from fedtune.wire import Schema

SCHEMA = Schema(
    (
        TensorSpec("a.R", (2, 3), "block.0"),
        TensorSpec("b.R", (3,), "block.1"),
        TensorSpec("head.bias", (), "head"),
    )
)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 40), st.floats(1e-3, 1e3), st.sampled_from([2**10, 2**16, 2**30])
)
def test_a_sum_is_within_a_step_a_client(seed, clients, clip, steps):
    rng = np.random.default_rng(seed)
    grid = headroom(clip, 40, steps=steps)
    vectors = rng.uniform(-clip, clip, (clients, 6))
    vectors[0, :4] = clip, -clip, 0, -0.0
    total = sum_plainly([quantise(v, grid, rng.random) for v in vectors], Terms(bytes(16), 0, 6, grid.bits))
    np.testing.assert_allclose(
        dequantise(total, grid, clients), vectors.sum(0), rtol=1e-12, atol=clients / grid.scale
    )


def test_rounding_has_the_right_mean_and_keeps_zeros():
    grid, rng = Grid(1.0, 4.0, 32, 2), np.random.default_rng(0)
    many = dequantise(quantise(np.tile([0.3, -0.3, 0.5, 0.0], 20_000), grid, rng.random), grid, 1)
    found = many.reshape(-1, 4).mean(0)
    np.testing.assert_allclose(found, [0.3, -0.3, 0.5, 0.0], atol=4 * 0.125 / math.sqrt(20_000))
    assert found[2] == 0.5 and found[3] == 0.0


def test_negative_numbers_wrap():
    always_down = np.zeros
    assert quantise(
        np.array([-1.0, 1.0]), Grid(1.0, 2.0, 32, 1), lambda n: 0.5 + always_down(n)
    ).tolist() == [2**32 - 2, 2]
    assert quantise(np.array([-1.0]), Grid(1.0, 2.0, 64, 1), np.zeros).tolist() == [2**64 - 2]


@pytest.mark.parametrize("bits", [32, 64])
def test_wrap_around_is_refused_at_the_exact_number(bits):
    clients = (2 ** (bits - 1) - 1) // 4  # clip 3 at scale 1: 4 steps each
    Grid(3.0, 1.0, bits, clients)
    with pytest.raises(
        ValueError,
        match=(
            rf"{clients + 1} clients of up to 4 steps \(clip 3, noise 0, scale 1\) "
            rf"wrap around 2\^{bits}: lower scale"
        ),
    ):
        Grid(3.0, 1.0, bits, clients + 1)
    with pytest.raises(ValueError, match="wrap around"):
        Grid(3.0, 1.0, bits, clients, noise=0.5)


@pytest.mark.parametrize(
    "clip, scale, bits, most, noise",
    [
        (0, 1, 32, 1, 0),
        (1, 0, 32, 1, 0),
        (math.nan, 1, 32, 1, 0),
        (1, math.inf, 32, 1, 0),
        (1, 1, 16, 1, 0),
        (1, 1, 32, 0, 0),
        (1, 1, 32, 1, -1),
        (1, 1, 32, 1, math.inf),
        (1, 2**53, 64, 1, 0),
    ],
)
def test_grids_out_of_bounds_are_refused(clip, scale, bits, most, noise):
    with pytest.raises(ValueError):
        Grid(clip, scale, bits, most, noise)


@settings(max_examples=300, deadline=None)
@given(st.floats(1e-6, 1e6), st.integers(1, 2**15), st.one_of(st.just(0.0), st.floats(1e-6, 1e6)))
def test_headroom_fits_and_a_finer_scale_would_not(clip, cohort, noise):
    try:
        grid = headroom(clip, cohort, noise=noise)
    except ValueError as e:
        assert "lower" in str(e) and noise / clip > 2**10
        return
    assert (
        grid.most == cohort
        and (grid.clip, grid.noise) == (clip, noise)
        and clip * grid.scale >= 2**16
        and math.frexp(grid.scale)[0] == 0.5
    )
    if grid.bits == 32:
        with pytest.raises(ValueError, match="wrap"):
            Grid(clip, 4 * grid.scale, 32, cohort, noise)


def test_headroom_takes_64_bits_where_32_are_too_coarse():
    assert (
        headroom(1.0, 100).bits == 32
        and headroom(1.0, 2**15).bits == 64
        and headroom(1.0, 100, noise=1000.0).bits == 64
    )
    assert headroom(1.0, 10, steps=2**30).scale == 2.0**40
    for wrong in ({"clip": 0.0}, {"noise": -1.0}, {"cohort": 0}, {"clip": math.inf}):
        with pytest.raises(ValueError, match="finite"):
            headroom(**({"clip": 1.0, "cohort": 10} | wrong))
    with pytest.raises(ValueError, match="even with 64 bits"):
        headroom(1.0, 10, noise=2.0**50)


@pytest.mark.parametrize("number", [1.0001, -1.0001, math.nan, math.inf, -math.inf])
def test_what_is_beyond_the_clip_is_refused(number):
    with pytest.raises(ValueError, match="clip"):
        quantise(np.array([0.0, number]), Grid(1.0, 4.0, 32, 2), np.random.default_rng(0).random)


def test_a_sum_that_no_vectors_have_is_refused():
    grid = Grid(1.0, 4.0, 32, 3)
    assert dequantise(np.array([10, 2**32 - 10], np.uint32), grid, 2).tolist() == [2.5, -2.5]
    for wrong in (11, 2**32 - 11, 2**31):
        with pytest.raises(Refused, match="range"):
            dequantise(np.array([wrong], np.uint32), grid, 2)
    for clients in (0, 4):
        with pytest.raises(ValueError, match="grid is for"):
            dequantise(np.zeros(1, np.uint32), grid, clients)


def arrays(rng, units):
    return {t.name: rng.uniform(-1, 1, t.shape).astype(np.float32) for t in SCHEMA.of_units(units)}


@pytest.mark.parametrize("bits", [32, 64])
def test_means_are_over_those_who_trained(bits):
    rng, grid = np.random.default_rng(1), Grid(1.0, 2.0**20, bits, 8)
    trained = [("block.0", "head"), ("head",), ("block.0", "head")]
    clients = [arrays(rng, units) for units in trained]
    packed = [pack(a, SCHEMA, units, grid, rng.random) for a, units in zip(clients, trained)]
    total = sum_plainly(packed, Terms(bytes(16), 0, length(SCHEMA), bits))
    totals = unpack(total, SCHEMA, grid, 3)
    assert totals.counts == {"block.0": 2, "block.1": 0, "head": 3}
    reference = {t.name: np.full(t.shape, 9, np.float32) for t in SCHEMA.tensors}
    found = means(totals, SCHEMA, reference)
    np.testing.assert_allclose(found["a.R"], (clients[0]["a.R"] + clients[2]["a.R"]) / 2, atol=2e-6)
    np.testing.assert_allclose(found["head.bias"], np.mean([c["head.bias"] for c in clients]), atol=2e-6)
    assert (found["b.R"] == 9).all() and all(a.dtype == np.float32 for a in found.values())


def test_what_does_not_fit_the_schema_is_refused():
    rng, grid = np.random.default_rng(1), Grid(1.0, 2.0**20, 32, 8)
    good = arrays(rng, SCHEMA.units)
    for wrong, units in (
        ({"a.R": good["a.R"]}, ("block.0", "block.1")),
        (good, ("block.0",)),
        (good | {"a.R": np.zeros((3, 2), np.float32)}, SCHEMA.units),
        (good, (*SCHEMA.units, "block.9")),
    ):
        with pytest.raises(ShapeMismatch):
            pack(wrong, SCHEMA, units, grid, rng.random)
    with pytest.raises(ShapeMismatch):
        unpack(np.zeros(5, np.uint32), SCHEMA, grid, 2)
    total = np.zeros(length(SCHEMA), np.uint32)
    total[-1] = 3
    with pytest.raises(Refused, match="range"):
        unpack(total, SCHEMA, grid, 2)
