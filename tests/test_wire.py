"""The wire: what goes in comes out; nothing else gets in."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.common.trees import norm, subtract
from fedtune.errors import Refused, ShapeMismatch
from fedtune.job import Job
from fedtune.round.coordinator import Coordinator
from fedtune.types import TensorSpec
from fedtune.wire import Schema, decode, encode, layout, packet_bytes, quick_norm, require_whole

SCHEMA = Schema(
    (
        TensorSpec("a.R", (4, 4), "block.0"),
        TensorSpec("b.R", (4, 4), "block.1"),
        TensorSpec("head.bias", (2,), "head"),
    )
)
ARRAYS = {t.name: np.arange(t.size, dtype=np.float32).reshape(t.shape) / 7 for t in SCHEMA.tensors}
GOOD = encode("update", SCHEMA, ARRAYS, round=3, frame="0" * 16, weight=5, metrics={"loss": (1.5, 5.0)})


def test_round_trip():
    packet = decode(GOOD, SCHEMA, kinds=["update"], round=3, frame="0" * 16)
    assert packet.header.weight == 5 and packet.metrics == {"loss": (1.5, 5.0)}
    assert all(np.array_equal(packet.arrays[n], a) for n, a in ARRAYS.items())


def test_part_of_the_tensors():
    packet = decode(encode("update", SCHEMA, {"b.R": ARRAYS["b.R"]}, round=1), SCHEMA, kinds=["update"])
    assert list(packet.arrays) == ["b.R"] and packet.header.tensors == [1]


def test_a_model_says_what_to_train():
    packet = decode(
        encode("model", SCHEMA, ARRAYS, round=1, train={"head.bias", "b.R"}), SCHEMA, kinds=["model"]
    )
    assert (
        packet.train == ("b.R", "head.bias")
        and packet.header.train == [1, 2]
        and list(packet.arrays) == list(ARRAYS)
    )
    whole = encode("model", SCHEMA, ARRAYS, round=1)
    assert encode("model", SCHEMA, ARRAYS, round=1, train=list(ARRAYS)) == whole and b"train" not in whole
    assert decode(whole, SCHEMA, kinds=["model"]).train is None
    with pytest.raises(ShapeMismatch, match=r"'c\.R' is not in the schema"):
        encode("model", SCHEMA, ARRAYS, round=1, train=["c.R"])


@pytest.mark.parametrize(
    "train, reason",
    [
        (b"[2,1]", "tensors"),
        (b"[1,1]", "tensors"),
        (b"[1,7]", "tensors"),
        (b"[-12]", "header"),
        (b"[   ]", "header"),
        (b"[1.5]", "header"),
        (b'"all"', "header"),
    ],
)
def test_what_to_train_that_cannot_be_is_refused(train, reason):
    good = encode("model", SCHEMA, ARRAYS, round=1, train=["b.R", "head.bias"])
    assert good.count(b"[1,2]") == 1
    with pytest.raises(Refused) as e:
        decode(
            good.replace(b"[1,2]", train) if len(train) == 5 else padded(good, train), SCHEMA, kinds=["model"]
        )
    assert e.value.reason == reason


def padded(packet, train):
    """The same with another list, and fewer spaces behind the header."""
    return packet.replace(b"[1,2]", train).replace(b" " * (len(train) - 5), b"", 1)


def test_an_update_does_not_say_what_to_train_and_a_part_of_a_model_is_not_enough():
    asking = (
        encode("model", SCHEMA, ARRAYS, round=1, train=["b.R"])
        .replace(b'"model"', b'"update"')
        .replace(b"  ", b" ", 1)
    )
    with pytest.raises(Refused, match="tensors: 'update' says what to train; only a model does"):
        decode(asking, SCHEMA, kinds=["update"])
    part = encode("model", SCHEMA, {"b.R": ARRAYS["b.R"]}, round=1, train=["b.R"])
    with pytest.raises(Refused, match="tensors: holds a part of the model"):
        require_whole(decode(part, SCHEMA, kinds=["model"]))


@pytest.mark.parametrize("names", [None, ["b.R"], ["a.R", "head.bias"], list(ARRAYS)])
def test_sizes_that_are_foretold_are_those_of_packets(names):
    arrays = {n: a for n, a in ARRAYS.items() if names is None or n in names}
    model = encode("model", SCHEMA, ARRAYS, round=12, frame="0" * 16, train=names)
    update = encode(
        "update",
        SCHEMA,
        arrays,
        round=12,
        frame="0" * 16,
        weight=1234.0,
        metrics={"loss": (1 / 3, 9.0), "accuracy": (7.0, 9.0)},
    )
    assert packet_bytes(SCHEMA, names) == (len(model), len(update))


def test_size_is_four_bytes_a_number():
    schema = Schema(tuple(TensorSpec(f"x{i}.R", (16, 16), "block.0") for i in range(36)))
    data = encode("update", schema, {t.name: np.ones(t.shape, np.float32) for t in schema.tensors}, round=1)
    assert len(data) <= 1.02 * 4 * 36 * 256 + 1024


@pytest.mark.parametrize(
    "reason, data, options",
    [
        ("size", b"", {}),
        ("size", GOOD + b"\0" * 70000, {}),
        ("size", GOOD[:-4], {}),
        ("magic", b"PK\3\4" + GOOD[4:], {}),
        ("header", GOOD[:4] + (10**9).to_bytes(4, "little") + GOOD[8:], {}),
        ("header", GOOD.replace(b'"weight":5.0', b'"weight":NaN'), {}),
        ("header", GOOD.replace(b'"weight":5.0', b'"weight":-3.'), {}),
        ("header", GOOD.replace(b'"weight"', b'"wAight"'), {}),
        ("kind", GOOD, {"kinds": ["model"]}),
        ("schema", GOOD.replace(SCHEMA.digest.encode(), b"f" * 16), {}),
        ("frame", GOOD, {"frame": "1" * 16}),
        ("round", GOOD, {"round": 4}),
        ("not-finite", GOOD[:-4] + np.float32("nan").tobytes(), {}),
        ("not-finite", GOOD[:-4] + np.float32("inf").tobytes(), {}),
    ],
)
def test_refusals_have_a_reason_each(reason, data, options):
    with pytest.raises(Refused) as e:
        decode(data, SCHEMA, **{"kinds": ["update"], "round": 3, "frame": "0" * 16} | options)
    assert e.value.reason == reason


def test_mutated_packets_are_refused_or_still_well_formed():
    draw, accepted = random.Random(0), 0
    for _ in range(30_000):
        data = bytearray(GOOD)
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(len(GOOD))] = draw.randrange(256)
        cut = draw.choice((0, 0, 0, *range(-8, 9)))
        data = bytes(data[:cut] if cut < 0 else data + b"\0" * cut)
        try:
            packet = decode(data, SCHEMA, kinds=["update"], round=3, frame="0" * 16)
        except Refused:
            continue
        accepted += 1
        assert len(data) == len(GOOD)  # nothing cut or added is ever accepted
        for name, array in packet.arrays.items():
            spec = next(t for t in SCHEMA.tensors if t.name == name)
            assert array.shape == spec.shape and array.dtype == np.float32 and np.isfinite(array).all()
        assert packet.header.weight >= 0
    assert accepted > 100


def test_a_layout_is_runs_of_one_shape():
    assert layout([("a", (2, 2)), ("b", (2, 2)), ("c", (4,)), ("d", (2, 2))]) == (
        (("a", "b"), (2, 2)),
        (("c",), (4,)),
        (("d",), (2, 2)),
    )
    assert layout([]) == ()


@pytest.mark.parametrize("names", [["a.R", "b.R", "head.bias"], ["a.R", "head.bias"], []])
def test_without_a_copy_the_same_comes_out(names):
    data = encode("update", SCHEMA, {n: ARRAYS[n] for n in names}, round=1)
    own, lent = decode(data, SCHEMA, kinds=["update"]), decode(data, SCHEMA, kinds=["update"], copy=False)
    assert (
        own.header == lent.header and own.norm == lent.norm and list(own.arrays) == list(lent.arrays) == names
    )
    assert own.arrays.vector.flags.writeable and not lent.arrays.vector.flags.writeable
    for name in names:
        np.testing.assert_array_equal(own.arrays[name], ARRAYS[name])
        np.testing.assert_array_equal(lent.arrays[name], ARRAYS[name])


def test_a_header_of_odd_length_is_no_obstacle():
    (length,) = np.frombuffer(GOOD[4:8], "<u4")
    data = GOOD[:4] + int(length + 1).to_bytes(4, "little") + GOOD[8 : 8 + length] + b" " + GOOD[8 + length :]
    packet = decode(data, SCHEMA, kinds=["update"], copy=False)
    assert all(np.array_equal(packet.arrays[n], a) for n, a in ARRAYS.items())


@pytest.mark.parametrize("size", [0, 1, 17, 2**16 - 1, 2**16, 2**16 + 1, 200_000])
@pytest.mark.parametrize("kind", ["normal", "equal", "one large"])
def test_the_quick_norm_is_within_a_percent(size, kind):
    vector = (
        {
            "normal": np.random.default_rng(size).standard_normal(size),
            "equal": np.full(size, 0.1),
            "one large": np.r_[np.full(size, 1e-3), 1e3][-size:],
        }[kind].astype(np.float32)
        if size
        else np.zeros(0, np.float32)
    )
    np.testing.assert_allclose(quick_norm(vector), norm({"x": vector}), rtol=0.01)


@pytest.mark.parametrize("place", [0, 5, 2**16 - 1, 2**16, 99_999])
def test_one_bad_number_anywhere_is_found_and_a_huge_one_is_not_bad(place):
    schema = Schema((TensorSpec("x", (100_000,), "x"),))
    for number in (np.nan, np.inf, -np.inf, 3e38, 1e-45):
        vector = np.ones(100_000, np.float32)
        vector[place] = number
        data = encode("update", schema, {"x": vector}, round=1)
        if np.isfinite(vector).all():  # the slow twin
            assert np.array_equal(decode(data, schema, kinds=["update"]).arrays["x"], vector)
        else:
            with pytest.raises(Refused, match="not-finite"):
                decode(data, schema, kinds=["update"])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.floats(-18, 18), st.floats(-18, 18), st.floats(0.3, 3.0))
def test_the_norm_limit_is_that_of_the_slow_twin(seed, update_size, model_size, near):
    """Far below the limit a bound is enough; whatever is accepted or refused,
    summing every difference says the same.
    """
    rng = np.random.default_rng(seed)
    model, sent = (
        {n: (rng.standard_normal(a.shape) * 10.0**size).astype(np.float32) for n, a in ARRAYS.items()}
        for size in (model_size, update_size)
    )
    packet = decode(encode("update", SCHEMA, sent, round=1), SCHEMA, kinds=["update"], copy=False)
    size = norm(subtract(sent, model))
    for limit in (near * size, near * (norm(sent) + norm(model)), size, np.nextafter(size, 0)):
        job = SimpleNamespace(
            federation=SimpleNamespace(max_norm=limit, max_weight=1.0, local_epochs=1), model=Job().model
        )
        coordinator = SimpleNamespace(job=job, schema=SCHEMA, state=SimpleNamespace(arrays=model))
        try:
            Coordinator._within_limits(coordinator, packet, norm(model))
            accepted = True
        except Refused as e:
            assert e.reason == "norm"
            accepted = False
        assert accepted == (size <= limit)
