"""System effects around an exchange: the same for every engine, which sees only the clients
that will answer in time.

Time is simulated: bytes over bandwidth and examples over speed, as the job's device classes have them.
Evaluation and the coordinator's own work take none of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from fedtune.algorithms.probes import probe_bytes
from fedtune.algorithms.units import Limits, limits_of, step_share, unlimited
from fedtune.job import DeviceClass, Job
from fedtune.round.coordinator import Coordinator
from fedtune.round.replies import Exchange, Reply
from fedtune.round.traffic import Traffic
from fedtune.simulation.devices import (
    Chosen,
    able,
    assign,
    available,
    drops_out,
    examples_run,
    round_seconds,
    span,
)
from fedtune.stateful.methods import method_of
from fedtune.types import ClientInfo, RoundReport
from fedtune.wire import Schema, kind_of, packet_bytes, trained_of

COUNTS = ("asked", "used", "dropped", "stragglers", "seconds", "up", "down")
"""What is added up for a class in a round. `seconds`: of the answers that came in time, together."""


@dataclass(frozen=True)
class Turn:
    """What becomes of one client that is asked: its class, the bytes it receives,
    its simulated seconds, and why it is lost.
    """

    client: str
    place: int
    down: int
    seconds: float
    lost: Literal["", "drop-out", "deadline"]


@dataclass(frozen=True)
class Probed:
    """What a probe took of one client: simulated seconds, and bytes both ways."""

    seconds: float
    down: int
    up: int


@dataclass
class Fleet:
    """The devices of a simulation's clients.

    `around` an exchange it loses replies; `gather` says who can be drawn.

    Attributes:
        steps: bytes that a training step of each class needs; None if not known.
        schema: what models and updates hold.
        gradient_bytes: a gradient of the first step as sent.
    """

    job: Job
    clients: Sequence[ClientInfo]
    steps: Sequence[int | None]
    schema: Schema
    gradient_bytes: int
    _turns: dict[str, Turn] = field(default_factory=dict)
    _up: dict[str, int] = field(default_factory=dict)
    """Of the round that is under way or was the last: the clients asked,
    and the bytes of those that answered.
    """
    _probed: dict[str, Probed] = field(default_factory=dict)
    """By client, of the probe that the round began with."""
    _frame: Callable[[str], int] = lambda client: 0
    """Bytes of the frame that go with the packet of a client asked now."""

    @property
    def devices(self) -> tuple[DeviceClass, ...]:
        return self.job.simulation.devices

    @cached_property
    def fit(self) -> np.ndarray:
        """Which classes have memory enough: booleans [classes]."""
        return able(self.devices, self.steps)

    @cached_property
    def classes(self) -> np.ndarray:
        """The class of each client as its place in `devices`: integers [clients]."""
        return assign(self.job.federation.seed, self.devices, len(self.clients))

    @cached_property
    def _place(self) -> dict[str, int]:
        return {client.name: place for place, client in enumerate(self.clients)}

    def limits(self, client: str) -> Limits:
        """Those of the client's class."""
        return limits_of(self.devices[self.classes[self._place[client]]])

    def can_probe(self, client: str) -> bool:
        return unlimited(self.schema, self.limits(client).depth)

    def available(self, round: int) -> Chosen:
        """The clients that can be asked in a round; 0 is what precedes the first."""
        return Chosen(
            self.clients, available(self.job.federation.seed, round, self.devices, self.classes, self.fit)
        )

    def gather(self, coordinator: Coordinator) -> None:
        """Before each round: the coordinator may draw those that are available,
        and its lines say what the round cost.
        """
        self._probed = {}
        held, frame = coordinator.traffic.rounds, coordinator.fixed.frame_bytes
        # planning a round has counted it already
        self._frame = lambda client: frame if held.get(client, 0) == 1 else 0
        coordinator.clients, coordinator.more, coordinator.can_probe = (
            self.available(coordinator.state.round + 1),
            self.line,
            self.can_probe,
        )

    def around(self, ask: Exchange) -> Exchange:
        """The same exchange over these devices.

        Clients that drop out or miss the deadline are not given to it.
        """

        def through(
            pairs: Sequence[tuple[str, bytes]], kind: str = "train", round: int = 0
        ) -> Iterator[Reply]:
            if pairs and kind_of(pairs[0][1]) == "probe":
                yield from self._probing(ask, pairs, kind, round)
                return
            answers = {packet: self._answer(packet, round) for packet in {packet for _, packet in pairs}}
            self._turns, self._up = (
                {
                    client: self._turn(client, len(packet), round, *answers[packet])
                    for client, packet in pairs
                },
                {},
            )
            for turn in self._turns.values():
                if turn.lost:
                    yield Reply(turn.client, None, turn.lost)
            for reply in ask(
                [pair for pair in pairs if not self._turns[pair[0]].lost], kind=kind, round=round
            ):
                self._up[reply.client] = reply.length
                yield reply

        return through

    def recall(self, traffic: Traffic) -> None:
        """After a restart: what preceded round 1, from the bytes it took."""
        self._turns = {
            client: self._turn(client, size, 0, self.gradient_bytes, 1.0)
            for client, size in traffic.down.items()
        }
        self._up = dict(traffic.up)

    def _probing(
        self, ask: Exchange, pairs: Sequence[tuple[str, bytes]], kind: str, round: int
    ) -> Iterator[Reply]:
        """All who can before the deadline answer a probe: drop-outs are lost while they train."""
        most, up = self.job.units.probe_batches * self.job.federation.batch_size, probe_bytes(self.schema)[1]
        for client, packet in pairs:
            size = len(packet)
            place = self._place[client]
            seconds = span(
                self.devices[self.classes[place]], size, min(self.clients[place].examples, most), up
            ).total
            late = seconds > self.job.federation.deadline
            self._probed[client] = Probed(
                self.job.federation.deadline if late else seconds, size, 0 if late else up
            )
            if late:
                yield Reply(client, None, "deadline")
        yield from ask([pair for pair in pairs if self._probed[pair[0]].up], kind=kind, round=round)

    def _answer(self, packet: bytes, round: int) -> tuple[int, float]:
        """Bytes of the answer to a packet, and the share of a whole step's work
        that is in one of its steps.
        """
        if not round:
            return self.gradient_bytes, 1.0
        trained = trained_of(packet, self.schema)
        return packet_bytes(self.schema, [t.name for t in trained.tensors])[1], step_share(
            self.schema, trained.units
        )

    def _turn(self, client: str, size: int, round: int, up: int, work: float) -> Turn:
        fed, place = self.job.federation, self._place[client]
        device, examples = self.devices[self.classes[place]], self.clients[place].examples
        run = (
            work * method_of(self.job).gradients * examples_run(examples, fed, round, client)
            if round
            else min(examples, self.job.adapter.init_examples)
        )
        down = size + self._frame(client)
        seconds = span(device, down, run, up).total
        dropped = drops_out(fed.seed, round, client, device)
        return Turn(
            client,
            int(self.classes[place]),
            down,
            seconds,
            "drop-out" if dropped else "deadline" if seconds > fed.deadline else "",
        )

    def line(self, report: RoundReport) -> dict[str, Any]:
        """What a round's line says beside the rest.

        Those lost to the fleet stand here and not among the refused.
        """
        turns = self._turns.values()
        lost = {reason: [t.client for t in turns if t.lost == reason] for reason in ("drop-out", "deadline")}
        came = [t.seconds for t in turns if t.client in self._up]
        open_ = self.available(report.round)
        # with nobody there, the next chance is after the deadline
        waited = len(came) < len(turns) or not len(open_)
        # training begins when all have answered
        probing = max((found.seconds for found in self._probed.values()), default=0.0)
        seconds = probing + round_seconds(
            came, waited and (report.round > 0 or len(turns) > 0), self.job.federation.deadline
        )
        return {
            "refused": {
                c: why for c, why in report.refused.items() if c not in self._turns or not self._turns[c].lost
            },
            "simulated_seconds": round(seconds, 3),
            "dropped": lost["drop-out"],
            "stragglers": lost["deadline"],
            "devices": self._tallies(report, open_.places),
        }

    def _tallies(self, report: RoundReport, open_: np.ndarray) -> dict[str, dict[str, Any]]:
        """By class: its clients, those that have the memory, those available in this round,
        and COUNTS of this round.
        """
        used = set(report.clients) if report.round else set(self._up)
        population, awake = (
            np.bincount(found, minlength=len(self.devices)).tolist()
            for found in (self.classes, self.classes[open_])
        )
        return {
            device.name: {
                "clients": population[i],
                "able": population[i] * bool(self.fit[i]),
                "available": awake[i],
            }
            | self._counts([t for t in self._turns.values() if t.place == i], used)
            for i, device in enumerate(self.devices)
        }

    def _counts(self, turns: Sequence[Turn], used: set[str]) -> dict[str, Any]:
        came = [t for t in turns if t.client in self._up]
        probed = [self._probed[t.client] for t in turns if t.client in self._probed]
        values = (
            len(turns),
            sum(t.client in used for t in turns),
            sum(t.lost == "drop-out" for t in turns),
            sum(t.lost == "deadline" for t in turns),
            round(sum(t.seconds for t in came) + sum(p.seconds for p in probed), 3),
            sum(self._up[t.client] for t in came) + sum(p.up for p in probed),
            sum(t.down for t in turns) + sum(p.down for p in probed),
        )
        return dict(zip(COUNTS, values, strict=True))
