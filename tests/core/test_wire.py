"""The wire: what goes in comes out; nothing else gets in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import Refused
from fedtune.types import TensorSpec
from fedtune.wire import Schema, decode, encode

SCHEMA = Schema((TensorSpec("a.R", (4, 4), "block.0"), TensorSpec("b.R", (4, 4), "block.1"), TensorSpec("head.bias", (2,), "head")))
ARRAYS = {t.name: np.arange(t.size, dtype=np.float32).reshape(t.shape) / 7 for t in SCHEMA.tensors}
GOOD = encode("update", SCHEMA, ARRAYS, round=3, frame="0" * 16, weight=5, metrics={"loss": (1.5, 5.0)})


def test_round_trip():
    packet = decode(GOOD, SCHEMA, kinds=["update"], round=3, frame="0" * 16)
    assert packet.header.weight == 5 and packet.metrics == {"loss": (1.5, 5.0)}
    assert all(np.array_equal(packet.arrays[n], a) for n, a in ARRAYS.items())


def test_part_of_the_tensors():
    packet = decode(encode("update", SCHEMA, {"b.R": ARRAYS["b.R"]}, round=1), SCHEMA, kinds=["update"])
    assert list(packet.arrays) == ["b.R"] and packet.header.tensors == [1]


def test_size_is_four_bytes_a_number():
    schema = Schema(tuple(TensorSpec(f"x{i}.R", (16, 16), "block.0") for i in range(36)))
    data = encode("update", schema, {t.name: np.ones(t.shape, np.float32) for t in schema.tensors}, round=1)
    assert len(data) <= 1.02 * 4 * 36 * 256 + 1024


@pytest.mark.parametrize("reason, data, options", [
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
])
def test_refusals_have_a_reason_each(reason, data, options):
    with pytest.raises(Refused) as e:
        decode(data, SCHEMA, **{"kinds": ["update"], "round": 3, "frame": "0" * 16} | options)
    assert e.value.reason == reason


@settings(max_examples=10_000, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.integers(-8, 8))
def test_mutated_packets_are_refused_or_still_well_formed(changes, cut):
    data = bytearray(GOOD)
    for place, byte in changes:
        data[place] = byte
    data = bytes(data[:cut] if cut < 0 else data + b"\0" * cut)
    try:
        packet = decode(data, SCHEMA, kinds=["update"], round=3, frame="0" * 16)
    except Refused:
        return
    assert len(data) == len(GOOD)  # nothing cut or added is ever accepted
    for name, array in packet.arrays.items():
        spec = next(t for t in SCHEMA.tensors if t.name == name)
        assert array.shape == spec.shape and array.dtype == np.float32 and np.isfinite(array).all()
    assert packet.header.weight >= 0
