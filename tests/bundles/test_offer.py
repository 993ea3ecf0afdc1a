"""What coordinator and device say before the first round, when the other side is not to be trusted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.bundles.offer import NAME, Offer, OfferAnswer, class_of, job_name, one_line
from fedtune.errors import Refused
from fedtune.job import parse_job

JOB = "0123456789abcdef" * 4
VALUES = st.one_of(
    st.text(), st.binary(), st.integers(), st.floats(), st.none(), st.booleans(), st.lists(st.integers())
)


def test_both_come_back_as_they_were():
    for offer in (
        Offer(JOB),
        Offer(JOB, {"manifest.json": b"{}", "job.toml": b"", "frame.safetensors": b"\0"}),
    ):
        assert Offer.load(offer.dump()) == offer
    for answer in (
        OfferAnswer("need"),
        OfferAnswer("ready", "", "phone-1", 120, 30),
        OfferAnswer("ready", "", "", 0, 0, "small board"),
        OfferAnswer("refused", "policy: max-rounds: too many", "x"),
    ):
        assert OfferAnswer.load(answer.dump()) == answer


@pytest.mark.parametrize(
    "name",
    [
        "",
        "0" * 63,
        "0" * 65,
        JOB.upper(),
        "../../../etc/passwd",
        "0" * 63 + "\n",
        JOB + "\n",
        b"0" * 64,
        0,
        None,
        [JOB],
    ],
)
def test_a_job_is_named_by_a_digest(name):
    for read in (job_name, lambda name: Offer.load({"job": name})):
        with pytest.raises(Refused, match=r"^job: is not named by 64 hexadecimal digits$"):
            read(name)


def test_an_offer_holds_the_known_files_and_nothing_else():
    values = {
        "job": JOB,
        "file:manifest.json": b"{}",
        "file:job.toml": "text",
        "file:../../evil.py": b"x",
        "file:model.safetensors": b"x",
        "manifest.json": b"x",
        "salt": "1",
    }
    assert Offer.load(values) == Offer(JOB, {"manifest.json": b"{}"})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"state": "owner"},
        {"state": b"ready"},
        {"state": "ready", "examples": -1},
        {"state": "ready", "held-out": 2**53},
        {"state": "ready", "examples": "many"},
        {"state": "ready", "examples": 1.5},
        {"state": "ready", "examples": float("nan")},
        {"state": "ready", "name": "../x"},
        {"state": "ready", "name": "a b"},
        {"state": "ready", "name": "a" * 65},
        {"state": "ready", "name": "é"},
        {"state": "ready", "name": "x\n"},
        {"state": "ready", "name": 7},
    ],
)
def test_what_is_no_answer_is_refused(values):
    with pytest.raises(Refused, match=r"^answer: "):
        OfferAnswer.load(values)


def test_a_class_is_one_of_the_jobs():
    job = parse_job(
        "", ["adapter.rank=8", 'simulation.devices=[{name = "small board", rank = 2}, {name = "laptop"}]']
    )
    assert (
        class_of(job, "") is None
        and class_of(job, "small board").rank == 2
        and class_of(job, "laptop").rank == 0
    )
    with pytest.raises(
        Refused,
        match=(
            r'^class: the job knows no class "phone": those of simulation\.devices are "small board", '
            r'"laptop"; name one of them, or none$'
        ),
    ):
        class_of(job, "phone")
    with pytest.raises(
        Refused,
        match=r'^class: the job knows no class "phone": it has none in simulation\.devices; name none$',
    ):
        class_of(parse_job("", []), "phone")
    assert OfferAnswer.load({"state": "ready", "kind": "x\x1b[2J" + "y" * 1000}).kind.isprintable()


@given(
    st.dictionaries(
        st.sampled_from(
            ["state", "reason", "name", "examples", "held-out", "held_out", "kind", "job", "extra"]
        ),
        VALUES,
    )
)
def test_any_values_are_an_answer_or_refused(values):
    try:
        answer = OfferAnswer.load(values)
    except Refused:
        return
    assert answer.state in ("ready", "need", "refused") and (not answer.name or NAME.fullmatch(answer.name))
    assert (
        answer.reason.isprintable()
        and len(answer.reason) <= 300
        and min(answer.examples, answer.held_out) >= 0
    )


@given(st.text())
def test_a_line_that_is_shown_is_one_line_and_short(text):
    line = one_line(text)
    assert line.isprintable() and len(line) == min(len(text), 300)


def test_a_reason_is_cleaned_on_both_sides():
    dirty = "\x1b[2J\x1b]0;owned\x07\r\n" + "x" * 1000
    for reason in (
        OfferAnswer("refused", dirty).dump()["reason"],
        OfferAnswer.load({"state": "refused", "reason": dirty}).reason,
    ):
        assert str(reason).isprintable() and len(str(reason)) == 300
