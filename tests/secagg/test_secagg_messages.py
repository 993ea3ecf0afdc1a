"""The wire of a round: what goes in comes out; whatever else comes is Refused and nothing but Refused."""

import contextlib
import copy
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_rounds import Cohort, terms

from fedtune.errors import Refused
from fedtune.secagg import messages
from fedtune.secagg.graph import Design
from fedtune.secagg.messages import Keys, Kind, Place
from fedtune.secagg.terms import STAGES

A, B = bytes(range(32)), bytes(range(32, 64))
SHARE = bytes(33)
T = terms()
READERS = {
    Kind.ASK_KEYS: (messages.ask_keys(T), lambda d: messages.read_ask_keys(d, T)),
    Kind.KEYS: (messages.keys(T, Keys(A, B)), lambda d: messages.read_keys(d, T)),
    Kind.NEIGHBOURS: (
        messages.place(T, Place(4, 2, {1: Keys(A, B), 2: Keys(B, A)})),
        lambda d: messages.read_place(d, T),
    ),
    Kind.SHARES: (
        messages.shares(T, 4, A, {1: bytes(82), 2: bytes(82)}),
        lambda d: messages.read_shares(d, T, 4),
    ),
    Kind.INBOX: (messages.inbox(T, {1: bytes(82), 2: bytes(82)}), lambda d: messages.read_inbox(d, T)),
    Kind.MASKED: (
        messages.masked(T, 4, np.arange(5, dtype=np.uint32)),
        lambda d: messages.read_masked(d, T, 4),
    ),
    Kind.SURVIVORS: (messages.survivors(T, [1, 4], [2]), lambda d: messages.read_survivors(d, T)),
    Kind.OPENED: (
        messages.opened(T, 4, {1: SHARE, 4: SHARE}, {2: SHARE}),
        lambda d: messages.read_opened(d, T, 4),
    ),
}


def reason(read, data):
    with pytest.raises(Refused) as e:
        read(data)
    assert "\n" not in str(e.value)
    return e.value.reason


def test_what_goes_in_comes_out():
    got = {kind: read(data) for kind, (data, read) in READERS.items()}
    assert got[Kind.KEYS] == Keys(A, B)
    assert got[Kind.NEIGHBOURS] == Place(4, 2, {1: Keys(A, B), 2: Keys(B, A)})
    assert got[Kind.SHARES] == (A, {1: bytes(82), 2: bytes(82)}) and got[Kind.INBOX] == {
        1: bytes(82),
        2: bytes(82),
    }
    assert got[Kind.MASKED].tolist() == [0, 1, 2, 3, 4]
    assert got[Kind.SURVIVORS] == ({1, 4}, {2})
    assert got[Kind.OPENED] == ({1: SHARE, 4: SHARE}, {2: SHARE})
    assert all(messages.kind_of(data) == kind for kind, (data, _) in READERS.items())


def test_sizes_are_as_documented():
    assert {kind.name: len(data) for kind, (data, _) in READERS.items()} == {
        "ASK_KEYS": 28,
        "KEYS": 28 + 64,
        "NEIGHBOURS": 28 + 9 + 2 + 2 * 66,
        "SHARES": 28 + 32 + 2 + 2 * 84,
        "INBOX": 28 + 2 + 2 * 84,
        "MASKED": 28 + 20,
        "SURVIVORS": 28 + 2 + 4 + 2 + 2,
        "OPENED": 28 + 2 + 70 + 2 + 35,
    }


@pytest.mark.parametrize("kind", Kind)
def test_each_field_of_the_header_is_checked(kind):
    data, read = READERS[kind]
    assert reason(read, b"") == reason(read, data[:27]) == "size"
    assert reason(read, b"FTP1" + data[4:]) == "magic"
    assert reason(read, data[:4] + b"\2" + data[5:]) == "version"
    assert reason(read, data[:5] + b"\x63" + data[6:]) == "kind"
    assert reason(read, data[:5] + bytes([(kind + 1) % 8]) + data[6:]) == "kind"
    assert reason(read, data[:6] + b"\xff" * 16 + data[22:]) == "session"
    assert reason(read, data[:22] + (4).to_bytes(4, "little") + data[26:]) == "round"
    assert reason(read, data[:26] + (3).to_bytes(2, "little") + data[28:]) == "sender"


@pytest.mark.parametrize("kind", Kind)
def test_nothing_cut_and_nothing_added(kind):
    data, read = READERS[kind]
    for n in range(28, len(data)):
        assert reason(read, data[:n]) == "size"
    for more in (b"\0", b"\0" * 84, b"\xff" * 100_000):
        assert reason(read, data + more) == "size"


def test_tables_are_bounded_and_in_order():
    read = READERS[Kind.SURVIVORS][1]
    head = READERS[Kind.SURVIVORS][0][:28]

    def of(*indices, count=None, more=b"\0\0"):
        return (
            head
            + (len(indices) if count is None else count).to_bytes(2, "little")
            + b"".join(i.to_bytes(2, "little") for i in indices)
            + more
        )

    assert read(of(1, 2)) == ({1, 2}, set())
    assert reason(read, of(2, 2)) == reason(read, of(3, 2)) == "duplicate"
    assert reason(read, of(1, 2**15)) == "client" and read(of(2**15 - 1))
    assert reason(read, of(1, 2, count=3, more=b"")) == "size"
    assert reason(read, of(*range(1026))) == "size" and read(of(*range(1025)))
    assert (
        reason(
            READERS[Kind.NEIGHBOURS][1],
            READERS[Kind.NEIGHBOURS][0][:28]
            + (2**15).to_bytes(2, "little")
            + READERS[Kind.NEIGHBOURS][0][30:],
        )
        == "neighbours"
    )


def test_shares_beyond_the_field_and_other_terms_are_refused():
    read = READERS[Kind.OPENED][1]
    assert (
        reason(read, messages.opened(T, 4, {1: b"\xff" * 33}, {}))
        == reason(read, messages.opened(T, 4, {}, {1: b"\xff" * 33}))
        == "share"
    )
    for other in (terms(6), terms(bits=64)):
        assert reason(READERS[Kind.NEIGHBOURS][1], messages.place(other, Place(4, 2, {}))) == "terms"


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(Kind),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=5),
    st.integers(-40, 8),
)
def test_mutated_messages_are_refused_or_still_well_formed(kind, changes, cut):
    data, read = READERS[kind]
    changed = bytearray(data)
    for at, byte in changes:
        changed[at % len(data)] = byte
    changed = bytes(changed[:cut] if cut < 0 else changed + b"\0" * cut)
    try:
        read(changed)
    except Refused:
        return
    assert len(changed) == len(data) and changed[:28] == data[:28]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(Kind), st.binary(max_size=300))
def test_anything_behind_a_good_header_is_refused_or_well_formed(kind, body):
    data, read = READERS[kind]
    with contextlib.suppress(Refused):
        read(data[:28] + body)
    try:
        read(body)
    except Refused as e:
        assert e.reason in ("size", "magic")


@cache
def standing(stage):
    """(cohort with the questions of `stage` open, the questions, honest answers)."""
    cohort = Cohort(4, Design(3, 3))
    questions = cohort.until(stage, {} if stage != "unmask" else {"device-3": "masked"})
    asked = copy.deepcopy(cohort)
    return cohort, questions, {n: asked.answer(stage, n, q) for n, q in questions.items()}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(STAGES),
    st.lists(st.tuples(st.integers(0, 2**12), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(-3, 2),
    st.booleans(),
)
def test_no_message_makes_either_side_do_anything_but_refuse(stage, changes, cut, to_client):
    cohort, questions, answers = standing(stage)
    data = bytearray((questions if to_client else answers)["device-0"])
    for at, byte in changes:
        data[at % len(data)] = byte
    data = bytes(data[:cut] if cut < 0 else data + b"\0" * cut)
    cohort = copy.deepcopy(cohort)
    try:
        if to_client:
            cohort.answer(stage, "device-0", data)
        else:
            cohort.server.take("device-0", data)
    except Refused:
        if to_client:
            assert cohort.rounds["device-0"]._state is None
        else:
            cohort.server.take("device-0", answers["device-0"])  # a refused answer has left nothing behind


@pytest.mark.parametrize("bits", [32, 64])
def test_bytes_of_a_client_are_as_docs_secagg_has_them(bits):
    cohort, up, down = Cohort(6, Design(4, 3), terms=terms(50, bits)), 0, 0

    def count(stage, name, answer):
        nonlocal up
        up += len(answer) if name == "device-0" else 0
        return answer

    for stage in STAGES:
        questions = cohort.server.ask()
        down += len(questions["device-0"])
        for name, answer in cohort.ask(change=count)(stage, questions):
            cohort.server.take(name, answer)
    assert (up, down) == (249 + 119 * 4 + 50 * bits // 8, 131 + 152 * 4)
