"""A device's own account: written before the training, kept through restarts, and stopping at its end."""

import numpy as np
import pytest

from fedtune.client.budget import Budget
from fedtune.errors import Refused
from fedtune.job import parse_job
from fedtune.privacy.releases import read
from fedtune.runs.ledger import Ledger
from fedtune.types import TensorSpec
from fedtune.wire import Schema, encode

PRIVATE = (
    "privacy.unit=example",
    "privacy.noise-multiplier=1.5",
    "privacy.clip=1.0",
    "privacy.examples=160",
    "federation.weighting=equal",
    "privacy.participations=3",
)
SCHEMA = Schema((TensorSpec("a", (2,), "head"),))


def packet(round: int, value: float = 0.0) -> bytes:
    return encode("model", SCHEMA, {"a": np.full(2, value, np.float32)}, round=round)


@pytest.fixture
def budget(tmp_path):
    return lambda *changes: Budget(tmp_path / "privacy", "ab" * 32, parse_job("", [*PRIVATE, *changes]))


def test_rounds_are_counted_and_end(budget):
    for round in (2, 5, 9):
        assert budget().charge(packet(round)) is None  # another object each time: as after a restart
    with pytest.raises(Refused, match=r"^privacy: the budget of 3 rounds \(epsilon 1\.\d+\) is spent"):
        budget().charge(packet(10))
    events = Ledger(budget().ledger).events()
    assert [e.round for e in events] == [2, 5, 9] and all(read(e.facts).count == 10 for e in events)


def test_the_same_question_has_the_same_answer_and_costs_once(budget):
    assert budget().charge(packet(1)) is None
    budget().keep(packet(1), b"answer")
    assert budget().charge(packet(1)) == b"answer"
    assert len(Ledger(budget().ledger).events()) == 1
    assert budget().charge(packet(1, 2.0)) is None  # the same round, another model: another release
    assert len(Ledger(budget().ledger).events()) == 2


def test_a_question_whose_answer_was_lost_here_costs_again_only_when_it_is_another(budget):
    """Killed between the ledger and the answer: what was trained never left,
    and the same packet is the same event.
    """
    assert budget().charge(packet(1)) is None and budget().charge(packet(1)) is None
    assert len(Ledger(budget().ledger).events()) == 1


def test_only_models_are_answered(budget):
    with pytest.raises(Refused, match=r"^privacy: only trained models"):
        budget().charge(encode("gradient-request", Schema(()), {}, round=0))


def test_a_job_without_privacy_is_not_counted(tmp_path):
    budget = Budget(tmp_path / "privacy", "ab" * 32, parse_job(""))
    assert (
        budget.charge(packet(1)) is None
        and budget.keep(packet(1), b"x") is None
        and not (tmp_path / "privacy").exists()
    )


def test_a_broken_promise_is_refused(budget):
    with pytest.raises(Refused, match=r"^privacy: privacy\.noise-multiplier"):
        _ = budget("privacy.epsilon=0.1").plan
