"""The ledger: append-only, each event once, and every kind of tampering seen."""

import sqlite3
from contextlib import closing

import pytest

from fedtune.errors import RunError
from fedtune.runs.ledger import Ledger, require_whole

FACTS = {"release": "updates", "clients": 3}


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "ledger.sqlite")
    for round in range(1, 5):
        made.record(round, FACTS)
    return made


def alter(ledger, statement, *values):
    with closing(sqlite3.connect(ledger.path)) as db, db:
        db.execute(statement, values)


def test_events_come_back_in_order(ledger):
    again = Ledger(ledger.path).events()
    assert [(e.sequence, e.round, e.facts) for e in again] == [(n, n, FACTS) for n in range(1, 5)]
    assert len({e.chain for e in again}) == 4


def test_the_same_event_of_the_same_round_is_recorded_once(ledger):
    before = ledger.events()
    ledger.record(4, dict(reversed(FACTS.items())))
    assert ledger.events() == before
    ledger.record(4, FACTS | {"release": "gradients"})
    ledger.record(5, FACTS)
    assert [e.round for e in ledger.events()] == [1, 2, 3, 4, 4, 5]


def test_the_chain_depends_on_all_that_came_before(tmp_path, ledger):
    other = Ledger(tmp_path / "other.sqlite")
    other.record(1, FACTS | {"clients": 4})
    for round in range(2, 5):
        other.record(round, FACTS)
    assert all(one.chain != two.chain for one, two in zip(ledger.events(), other.events()))


@pytest.mark.parametrize(
    "event, statement, values",
    [
        (2, "UPDATE events SET facts = ? WHERE sequence = 2", ('{"release": "nothing"}',)),
        (2, "UPDATE events SET round = 9 WHERE sequence = 2", ()),
        (2, "UPDATE events SET chain = ? WHERE sequence = 2", ("0" * 64,)),
        (2, "DELETE FROM events WHERE sequence = 2", ()),
        (1, "DELETE FROM events WHERE sequence = 1", ()),
        (5, "INSERT INTO events VALUES (5, 5, '{}', 'made up')", ()),
        (4, "UPDATE events SET sequence = 5 WHERE sequence = 4", ()),
    ],
)
def test_tampering_is_seen(event, statement, values, ledger):
    alter(ledger, statement, *values)
    with pytest.raises(RunError, match=f"event {event} was changed or removed; no privacy can be claimed"):
        ledger.events()


def test_nothing_is_recorded_before_a_crash_or_all_of_it_is(ledger):
    """A transaction that never ended leaves no event behind."""
    db = sqlite3.connect(ledger.path)
    db.execute("INSERT INTO events VALUES (5, 5, '{}', '')")
    db.close()
    assert len(ledger.events()) == 4


def test_a_file_that_is_no_ledger_is_not_overwritten(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"something else" * 100)
    with pytest.raises(RunError, match=r"not a ledger .* restore it from a backup"):
        Ledger(path)
    assert path.read_bytes() == b"something else" * 100


def test_a_ledger_cut_short_is_seen(ledger):
    ledger.path.write_bytes(ledger.path.read_bytes()[:5000])
    with pytest.raises(RunError, match="ledger"):
        Ledger(ledger.path).events()


def test_a_ledger_that_lost_rounds_is_not_gone_on_with(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(RunError, match=r"ledger\.sqlite: is missing; restore it"):
        require_whole(path, 1)
    Ledger(path).record(1, {"release": "updates"})
    require_whole(path, 1)
    with pytest.raises(RunError, match="no event of round 2"):
        require_whole(path, 2)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE events SET facts = '{}'")
    with pytest.raises(RunError, match="event 1 was changed or removed"):
        require_whole(path, 1)
