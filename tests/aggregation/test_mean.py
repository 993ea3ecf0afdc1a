"""Averaging: exact on cores, per tensor over its owners, streaming."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.aggregation import mean as module
from fedtune.aggregation.mean import weighted_mean
from fedtune.errors import EmptyCohort, ShapeMismatch
from fedtune.types import Update
from fedtune.wire import Pieces, layout


def update(client, weight, **arrays):
    return Update(client, 1, {n: np.asarray(a, np.float32) for n, a in arrays.items()}, weight)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 8),
    st.integers(1, 6),
    st.lists(st.floats(0.1, 1e4), min_size=1, max_size=6),
)
def test_mean_of_products_is_product_of_mean(seed, r, extra, weights):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((r, r + extra)), rng.standard_normal((r + 2 * extra, r))
    cores = [rng.standard_normal((r, r)).astype(np.float32) for _ in weights]
    mean = weighted_mean(
        (update(str(i), w, R=c) for i, (w, c) in enumerate(zip(weights, cores))),
        {"R": np.zeros((r, r), np.float32)},
    )
    direct = sum(w * (b @ c @ a) for w, c in zip(weights, cores)) / sum(weights)
    np.testing.assert_allclose(b @ mean.arrays["R"] @ a, direct, atol=1e-5 * r)


def test_tensors_are_averaged_over_those_that_hold_them():
    reference = {n: np.full(2, 9, np.float32) for n in "xyz"}
    mean = weighted_mean([update("a", 1, x=[0, 0], y=[1, 1]), update("b", 3, x=[4, 4])], reference)
    assert (
        mean.arrays["x"].tolist() == [3, 3]
        and mean.arrays["y"].tolist() == [1, 1]
        and mean.arrays["z"].tolist() == [9, 9]
    )
    assert mean.clients == ("a", "b") and mean.weight == 4


def test_each_unit_has_the_weights_of_its_owners():
    """w_i = n_i / sum of n_j over those that hold the unit, whatever else they hold;
    the keys are those of all replies together.
    """
    rng, sizes = np.random.default_rng(0), {"a": 3.0, "b": 5.0, "c": 11.0}
    owners = {"block.0.R": "ac", "block.1.R": "b", "block.2.R": "", "head.weight": "abc"}
    reference = {name: rng.standard_normal((4, 4)).astype(np.float32) for name in owners}
    values = {(name, who): rng.standard_normal((4, 4)).astype(np.float32) for name in owners for who in sizes}
    updates = [
        Update(who, 1, {name: values[name, who] for name in owners if who in owners[name]}, n)
        for who, n in sizes.items()
    ]
    found = weighted_mean(updates, reference)
    for name, own in owners.items():
        total = sum(sizes[who] for who in own)
        exact = (
            sum(sizes[who] / total * values[name, who].astype(np.float64) for who in own)
            if own
            else reference[name]
        )
        np.testing.assert_allclose(found.arrays[name], exact, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found.arrays["block.1.R"], values["block.1.R", "b"])
    np.testing.assert_array_equal(found.arrays["block.2.R"], reference["block.2.R"])
    assert list(found.arrays) == list(owners) and found.weight == 19.0


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


SHAPES = {"a": (3, 5), "b": (3, 5), "c": (40,), "d": ()}
NUMBERS = 71


def as_pieces(client, weight, vector, shapes=SHAPES):
    return Update(client, 1, Pieces(vector, layout(shapes.items())), weight)


def obvious_mean(updates, reference):
    """The slow twin: one tensor at a time, everything in float64, in the order given."""
    means = {}
    for name, array in reference.items():
        held = [(u.weight, u.arrays[name].astype(np.float64)) for u in updates if name in u.arrays]
        total = sum(w for w, _ in held)
        means[name] = (sum(w * a for w, a in held) / total).astype(np.float32) if total > 0 else array
    return means


@pytest.mark.parametrize(
    "waiting, size, stretch",
    [(8, 2**25, 2**13), (8, 2**25, 16), (3, 2**25, 70), (8, 4 * NUMBERS * 2, 71), (8, 1, 1)],
)
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 25])
def test_updates_that_are_one_vector_have_the_mean_of_the_slow_twin(
    count, waiting, size, stretch, monkeypatch
):
    """All kinds mixed: whole vectors, the same in another order, plain tensors, some of the tensors.

    Every batch and stretch size.
    """
    monkeypatch.setattr(module, "WAITING", waiting)
    monkeypatch.setattr(module, "WAITING_BYTES", size)
    monkeypatch.setattr(module, "STRETCH", stretch)
    rng = np.random.default_rng(count)
    updates = []
    for i in range(count):
        whole = as_pieces(
            f"c{i}",
            float(rng.uniform(0, 1e4)),
            rng.standard_normal(NUMBERS).astype(np.float32) * 10.0 ** rng.integers(-3, 4),
        )
        other = as_pieces(f"c{i}", whole.weight, whole.arrays.vector, dict(reversed(SHAPES.items())))
        plain = Update(f"c{i}", 1, dict(whole.arrays), whole.weight)
        part = as_pieces(f"c{i}", whole.weight, whole.arrays.vector[:30], {n: SHAPES[n] for n in "ab"})
        updates.append([whole, whole, other, plain, part][int(rng.integers(5)) if i % 3 == 2 else 0])
    before = [{n: a.copy() for n, a in u.arrays.items()} for u in updates]
    reference = {name: np.full(SHAPES[name], 9, np.float32) for name in "dcba"}
    means, expected = weighted_mean(iter(updates), reference).arrays, obvious_mean(updates, reference)
    assert list(means) == list(reference)
    for name in reference:
        # Both round a float64 that is off by some 1e-15: at most to neighbours.
        # Where large terms cancel, relative to those.
        np.testing.assert_allclose(means[name], expected[name], rtol=1.2e-7, atol=1e-11)
    assert all(np.array_equal(u.arrays[n], a) for u, b in zip(updates, before) for n, a in b.items())


def test_the_sum_is_in_float64():
    """Ones beside 2^24 are lost in float32."""
    vectors = (
        [np.full(NUMBERS, 2.0**24, np.float32)]
        + [np.full(NUMBERS, 1.0, np.float32)] * 99
        + [np.full(NUMBERS, -(2.0**24), np.float32)]
    )
    updates = [as_pieces(str(i), 1.0, v) for i, v in enumerate(vectors)]
    mean = weighted_mean(updates, {n: np.zeros(s, np.float32) for n, s in SHAPES.items()})
    assert all((a == np.float32(99 / 101)).all() for a in mean.arrays.values())


def test_few_updates_are_held_at_once():
    """While an update is made, all but the last WAITING are gone: nothing keeps them."""
    import weakref

    made: list[weakref.ref] = []

    def updates():
        for i in range(50):
            vector = np.ones(NUMBERS, np.float32)
            made.append(weakref.ref(vector))
            yield as_pieces(str(i), 1.0, vector)
            del vector
            assert sum(r() is not None for r in made) <= module.WAITING

    weighted_mean(updates(), {n: np.zeros(s, np.float32) for n, s in SHAPES.items()})
    assert not any(r() is not None for r in made)


def test_one_vector_of_wrong_shapes_is_refused():
    wrong = as_pieces("a", 1.0, np.zeros(NUMBERS, np.float32), SHAPES | {"a": (5, 3)})
    right = as_pieces("b", 1.0, np.zeros(NUMBERS, np.float32))
    reference = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    for updates in ([wrong], [right, wrong]):
        with pytest.raises(
            ShapeMismatch, match=r"client 'a', tensor 'a': shape \(5, 3\), the model has \(3, 5\)"
        ):
            weighted_mean(updates, reference)
