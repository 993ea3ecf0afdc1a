"""The ledger: an append-only list of what left the devices, hash-chained in a SQLite file.

Epsilon is a reading of it.

An event is written before its release, never after. What the events say is `privacy.releases`' matter, what
they cost `privacy.accounting`'s. With `privacy.unit = "none"` every round is one unprotected release, so
any reading is infinite.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import RunError
from fedtune.process.waits import LEDGER_SECONDS

_GENESIS = "0" * 64


@dataclass(frozen=True)
class Event:
    """One release: its place in the ledger, the round, what was released by which
    mechanism, and the chain hash.
    """

    sequence: int
    round: int
    facts: dict[str, Any]
    chain: str


class Ledger:
    """An open ledger file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with closing(self._connect()) as db, db:
                db.execute(
                    "CREATE TABLE IF NOT EXISTS events (sequence INTEGER PRIMARY KEY, round INTEGER NOT "
                    "NULL, facts TEXT NOT NULL, chain TEXT NOT NULL)"
                )
                db.execute("CREATE INDEX IF NOT EXISTS by_round ON events (round)")
        except sqlite3.DatabaseError as e:
            raise RunError(
                f"{path}: not a ledger ({e}); restore it from a backup, without it no privacy can be claimed"
            ) from None

    def record(self, round: int, facts: dict[str, Any]) -> None:
        """Appends one event, once: the same event of the same round again (a resumed round) adds nothing."""
        text = json.dumps(facts, sort_keys=True)
        with closing(self._connect()) as db, db:
            if db.execute("SELECT 1 FROM events WHERE round = ? AND facts = ?", (round, text)).fetchone():
                return
            last = db.execute(
                "SELECT sequence, chain FROM events ORDER BY sequence DESC LIMIT 1"
            ).fetchone() or (0, _GENESIS)
            db.execute(
                "INSERT INTO events VALUES (?, ?, ?, ?)",
                (last[0] + 1, round, text, _link(last[1], last[0] + 1, round, text)),
            )

    def events(self) -> tuple[Event, ...]:
        """All events in order. Raises RunError when the chain shows that one was changed or removed."""
        return tuple(self._checked())

    def _checked(self) -> Iterator[Event]:
        chain = _GENESIS
        try:
            with closing(self._connect()) as db:
                rows = db.execute(
                    "SELECT sequence, round, facts, chain FROM events ORDER BY sequence"
                ).fetchall()
        except sqlite3.DatabaseError as e:
            raise RunError(
                f"{self.path}: cannot be read ({e}); restore it from a backup, "
                "without it no privacy can be claimed"
            ) from None
        for expected, (sequence, round, text, stored) in enumerate(rows, 1):
            chain = _link(chain, sequence, round, text)
            if sequence != expected or stored != chain:
                raise RunError(
                    f"{self.path}: event {expected} was changed or removed; "
                    "no privacy can be claimed from this ledger"
                )
            yield Event(sequence, round, json.loads(text), chain)

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=LEDGER_SECONDS)
        db.execute("PRAGMA synchronous = FULL")
        return db


def require_whole(path: Path, rounds: int, first: int = 1) -> None:
    """Raises RunError unless the ledger is there, unchanged, and has an event for each of rounds
    `first`..`rounds`; 0 is what precedes the first. Where no round was run yet there need not be one.
    """
    if not path.exists():
        if rounds < first:
            return
        raise RunError(
            f"{path}: is missing; restore it, what left the clients cannot be accounted for without it"
        )
    known = {event.round for event in Ledger(path).events()}
    for round in range(first, rounds + 1):
        if round not in known:
            raise RunError(
                f"{path}: has no event of round {round}, but that round was run; restore the ledger"
            )


def _link(previous: str, sequence: int, round: int, text: str) -> str:
    return hashlib.sha256(f"{previous}|{sequence}|{round}|{text}".encode()).hexdigest()
