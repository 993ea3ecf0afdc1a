"""The coordinator's side of a round, without any transport; and the round from first question to sum."""

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.errors import Refused, SecAggFailed
from fedtune.secagg import messages
from fedtune.secagg.graph import Design, neighbours
from fedtune.secagg.keys import require_usable
from fedtune.secagg.messages import Keys, Place
from fedtune.secagg.reveal import Circle, Masked, reveal, short
from fedtune.secagg.terms import MAX_CLIENTS, STAGES, Terms

Query = Callable[[str, Mapping[str, bytes]], Iterable[tuple[str, bytes | None]]]
"""(stage, question by client) -> (client, answer, or None where none came), in any order, as they come."""


@dataclass(frozen=True)
class Sum:
    """vector: [length], the sum modulo 2^bits. clients: those in it, in the order they were given.
    refused: why the others are not, where known.
    """

    vector: np.ndarray
    clients: tuple[str, ...]
    refused: Mapping[str, str]


def run_round(server: "ServerRound", query: Query) -> Sum:
    """All four stages.

    An answer that is refused counts as none. Raises SecAggFailed when too few are left at any stage.
    """
    for stage in STAGES:
        for client, answer in query(stage, server.ask()):
            if answer is None:
                continue
            try:
                server.take(client, answer)
            except Refused as e:
                server.refused.setdefault(client, str(e))
    return server.finish()


class ServerRound:
    """One round at the coordinator: `ask`, `take` what comes back, and again, four times; then `finish`."""

    def __init__(self, terms: Terms, clients: Sequence[str], design: Design) -> None:
        """clients: names of those to ask. design: the graph's; in a smaller cohort than it was made
        for the threshold stays.

        Raises ValueError when names repeat, are too many, or are fewer than the threshold.
        """
        if len(set(clients)) != len(clients) or not design.threshold <= len(clients) <= MAX_CLIENTS:
            raise ValueError(
                f"{len(clients)} clients: their names must differ, and be {design.threshold} "
                f"(the threshold) to {MAX_CLIENTS}"
            )
        self.terms, self.clients = terms, tuple(clients)
        self.refused: dict[str, str] = {}
        self._stage: _Stage | None = _KeysStage(terms, self.clients, design)
        self._started, self._waiting = False, set[str]()

    def ask(self) -> dict[str, bytes]:
        """Ends the stage that runs and gives the next one's question by client.

        Raises SecAggFailed, for good, when too few answered.
        """
        stage = self._end()
        if self._started:
            stage = stage.next()
        self._stage, self._started = stage, True
        questions = stage.questions()
        self._waiting = set(questions)
        return questions

    def take(self, client: str, answer: bytes) -> None:
        """One client's answer to the question that is open. Raises Refused, and is then as it was before."""
        if self._stage is None or client not in self._waiting:
            known = client in self.clients
            raise Refused(
                "duplicate" if known else "client",
                "was not asked at this stage, or has answered" if known else "was not asked",
            )
        self._stage.take(client, answer)
        self._waiting.remove(client)

    def finish(self) -> Sum:
        """The sum, after the last stage.

        Raises SecAggFailed, for good, when too few answered or a secret is not what was promised.
        """
        stage = self._end()
        if not isinstance(stage, _UnmaskStage):
            raise SecAggFailed("the round is not at its last stage")
        vector = stage.sum()
        inside = {stage.circle.names[i] for i in stage.masked.there}
        return Sum(vector, tuple(c for c in self.clients if c in inside), dict(self.refused))

    def _end(self) -> "_Stage":
        """The running stage, taken out, so that an error leaves a round that is over."""
        stage, self._stage, self._waiting = self._stage, None, set()
        if stage is None:
            raise SecAggFailed("the round is over")
        return stage


class _KeysStage:
    def __init__(self, terms: Terms, clients: tuple[str, ...], design: Design) -> None:
        self.terms, self.clients, self.design = terms, clients, design
        self.keys: dict[str, Keys] = {}
        self.seen: set[bytes] = set()

    def questions(self) -> dict[str, bytes]:
        return dict.fromkeys(self.clients, messages.ask_keys(self.terms))

    def take(self, client: str, answer: bytes) -> None:
        found = messages.read_keys(answer, self.terms)
        both = {found.sealing, found.masking}
        if len(both) < 2 or both & self.seen:
            raise Refused("key", "a public key that is already there")
        for key in both:
            require_usable(key)
        self.keys[client] = found
        self.seen |= both

    def next(self) -> "_SharesStage":
        _enough(len(self.keys), self.design.threshold, "sent keys")
        # a client's index is its place on the ring
        names = secrets.SystemRandom().sample(sorted(self.keys), len(self.keys))
        circle = Circle(
            self.terms,
            self.design.threshold,
            tuple(names),
            tuple(self.keys[n] for n in names),
            neighbours(len(names), self.design.degree),
        )
        return _SharesStage(circle)


class _SharesStage:
    def __init__(self, circle: Circle) -> None:
        self.circle = circle
        self.checks: dict[int, bytes] = {}
        self.sealed: dict[int, dict[int, bytes]] = {}

    def questions(self) -> dict[str, bytes]:
        c = self.circle
        return {
            name: messages.place(c.terms, Place(i, c.threshold, {j: c.keys[j] for j in c.neighbours[i]}))
            for i, name in enumerate(c.names)
        }

    def take(self, client: str, answer: bytes) -> None:
        index = self.circle.index[client]
        check, sealed = messages.read_shares(answer, self.circle.terms, index)
        if sealed.keys() != set(self.circle.neighbours[index]):
            raise Refused("client", "shares are not for its neighbours")
        self.checks[index], self.sealed[index] = check, sealed

    def next(self) -> "_MaskedStage":
        _enough_everywhere(self.circle, self.sealed, self.sealed, "shared their seeds")
        return _MaskedStage(self.circle, self.checks, self.sealed)


class _MaskedStage:
    def __init__(
        self, circle: Circle, checks: Mapping[int, bytes], sealed: Mapping[int, Mapping[int, bytes]]
    ) -> None:
        self.circle, self.checks, self.sealed = circle, checks, sealed
        self.total = np.zeros(circle.terms.length, circle.terms.dtype)
        self.there: set[int] = set()

    def questions(self) -> dict[str, bytes]:
        c = self.circle
        return {
            c.names[i]: messages.inbox(
                c.terms, {j: self.sealed[j][i] for j in c.neighbours[i] if j in self.sealed}
            )
            for i in self.sealed
        }

    def take(self, client: str, answer: bytes) -> None:
        index = self.circle.index[client]
        self.total += messages.read_masked(answer, self.circle.terms, index)
        self.there.add(index)

    def next(self) -> "_UnmaskStage":
        _enough_everywhere(self.circle, self.checks, self.there, "sent a vector")
        return _UnmaskStage(self.circle, Masked(self.total, frozenset(self.there), dict(self.checks)))


class _UnmaskStage:
    def __init__(self, circle: Circle, masked: Masked) -> None:
        self.circle, self.masked = circle, masked
        self.opened: dict[int, tuple[dict[int, bytes], dict[int, bytes]]] = {}

    def questions(self) -> dict[str, bytes]:
        return {
            self.circle.names[i]: messages.survivors(self.circle.terms, *self._lists(i))
            for i in self.masked.there
        }

    def take(self, client: str, answer: bytes) -> None:
        index = self.circle.index[client]
        seeds, mask_keys = messages.read_opened(answer, self.circle.terms, index)
        there, gone = self._lists(index)
        if (seeds.keys(), mask_keys.keys()) != (set(there), set(gone)):
            raise Refused("client", "shares of others than were asked for")
        self.opened[index] = seeds, mask_keys

    def next(self) -> "_Stage":
        raise SecAggFailed("all four questions were asked: the round is over")

    def sum(self) -> np.ndarray:
        _enough_everywhere(self.circle, self.masked.checks, self.opened, "opened their shares")
        return reveal(self.circle, self.masked, self.opened)

    def _lists(self, index: int) -> tuple[list[int], list[int]]:
        """The holders of a client's circle that shared: who sent a vector, who did not."""
        holders = sorted(i for i in (index, *self.circle.neighbours[index]) if i in self.masked.checks)
        return [i for i in holders if i in self.masked.there], [
            i for i in holders if i not in self.masked.there
        ]


_Stage = _KeysStage | _SharesStage | _MaskedStage | _UnmaskStage


def _enough(count: int, threshold: int, what: str) -> None:
    if count < threshold:
        raise SecAggFailed(
            f"{count} clients {what}, {threshold} are needed: the round is void and nothing is released"
        )


def _enough_everywhere(circle: Circle, whose: Iterable[int], there: Iterable[int], what: str) -> None:
    """In all, and around each of `whose`."""
    found_there = frozenset(there)
    _enough(len(found_there), circle.threshold, what)
    found = short(circle, whose, found_there)
    if found:
        name, count = found
        raise SecAggFailed(
            f"around client {name!r} {count} of the holders of its shares {what}, {circle.threshold} are "
            "needed: the round is void and nothing is released"
        )
