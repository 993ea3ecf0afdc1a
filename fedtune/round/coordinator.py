"""The coordinator's side of a round, without any transport: plan, check what comes back,
step, record, checkpoint.

An engine asks `plan` for (client, packet) pairs, has them answered in any way it likes, and gives the replies
to `finish`. All engines run this same object.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedtune.algorithms import Algorithm, State
from fedtune.algorithms.dp_fed_avg import CLIP
from fedtune.algorithms.probes import answers
from fedtune.algorithms.units import begins_with_probe, tensors_of, with_scores
from fedtune.common.trees import norm
from fedtune.errors import EmptyCohort, Refused, SecAggFailed
from fedtune.job import Job
from fedtune.privacy.contribution import Secure, message_bytes, secure_of
from fedtune.privacy.plan import PrivacyPlan, fewest
from fedtune.privacy.releases import Release, read
from fedtune.round.checks import require_assigned, require_within_limits
from fedtune.round.lines import held_out_of, round_line, trained_in
from fedtune.round.participation import Participation
from fedtune.round.probing import NOT_ASKED, Probe, scores_in
from fedtune.round.replies import Reply
from fedtune.round.traffic import Traffic
from fedtune.runs.checkpoint import Checkpoint
from fedtune.runs.folder import RunFolder
from fedtune.runs.ledger import Ledger, require_whole
from fedtune.secagg.server import Sum
from fedtune.stateful.scaffold import controls_of
from fedtune.types import Arrays, ClientInfo, Metrics, RoundReport, Update, Work
from fedtune.wire import Packet, Schema, decode, encode, places

SumUp = Callable[[dict[str, str]], Sum]
"""Takes a round to its secure sum and notes in the dict why which clients are not in it.

Raises SecAggFailed when it does not open.
"""
Evaluate = Callable[[int, Arrays], Metrics | None]
"""(finished rounds, model) -> held-out metrics, or None in a round that is not evaluated."""


@dataclass(frozen=True)
class Fixed:
    """What stays through all rounds of a run.

    Attributes:
        frame: digest of the frame.
        privacy: None for a job without.
        secure: how updates are summed, where single ones are not to be seen.
    """

    job: Job
    schema: Schema
    frame: str
    frame_bytes: int
    algorithm: Algorithm
    run: RunFolder
    evaluate: Evaluate
    privacy: PrivacyPlan | None
    secure: Secure | None


@dataclass
class Coordinator:
    """Runs rounds on one run folder.

    Make it with `start`; it continues from the folder's newest checkpoint.
    """

    fixed: Fixed
    state: State
    traffic: Traffic
    clients: Sequence[ClientInfo]
    on_round: Callable[[dict], None] = lambda line: None
    on_reply: Callable[[Reply], None] = lambda reply: None
    more: Callable[[RoundReport], dict] = lambda report: {}
    """What a round's line says besides, or in another way, where the clients are simulated."""
    can_probe: Callable[[str], bool] = lambda client: True
    """Whether a client can answer a probe; others are not asked."""
    _participation: Participation = field(default_factory=Participation)
    _probe: Probe = field(default_factory=Probe)
    _planned: dict[str, Work] = field(default_factory=dict)
    """Of the round that is under way: the clients asked, and what each trains."""
    _unfinished: dict[str, Any] | None = None
    """Of a round whose model the process before this one stored and may not have scored."""
    _began: float = 0.0

    @property
    def job(self) -> Job:
        return self.fixed.job

    @property
    def schema(self) -> Schema:
        return self.fixed.schema

    @property
    def run(self) -> RunFolder:
        return self.fixed.run

    @property
    def privacy(self) -> PrivacyPlan | None:
        return self.fixed.privacy

    @property
    def secure(self) -> Secure | None:
        return self.fixed.secure

    @property
    def done(self) -> bool:
        return self.state.round >= self.job.federation.rounds

    def begin(self) -> None:
        """Before the first round of this process: evaluates the start and writes checkpoint 0; on a
        resumed run ends a round that was cut off.
        """
        self._began = time.monotonic()
        if self.run.newest() is None:
            self._record(RoundReport(0, (), 0.0, {}))
        elif self._unfinished is not None:
            self._show(self._unfinished)
        self._unfinished = None

    def probe(self) -> list[tuple[str, bytes]]:
        """The (client, packet) pairs of the questions that come before the next round's plan: which blocks
        matter. None where it begins without.
        """
        self._probe = Probe()
        if not begins_with_probe(self.job, self.state.round + 1):
            return []
        self._began = time.monotonic()
        ranks = {a.client: a.rank for a in self.fixed.algorithm.plan(self.state, self.clients)}
        self._probe = Probe(tuple(ranks))
        able = [client for client in ranks if self.can_probe(client)]
        if not able:
            self.probed(())
            return []
        packets = {
            rank: encode(
                "probe", self.schema, self._held(rank), round=self.state.round + 1, frame=self.fixed.frame
            )
            for rank in {ranks[client] for client in able}
        }
        for client in able:
            self._count_probe(client, down=len(packets[ranks[client]]))
        return [(client, packets[ranks[client]]) for client in able]

    def probed(self, replies: Iterable[Reply]) -> None:
        """Takes the answers to `probe`.

        A client that cannot be asked, or whose answer is missing, wrong or says nothing,
        goes by the mean of the others.
        """
        found, expected, asked = dict[str, np.ndarray](), answers(self.schema), self._probe.asked
        silent = {client: "no reply" if self.can_probe(client) else NOT_ASKED for client in asked}
        for reply in replies:
            if reply.late:
                self.traffic.late += 1
                self.traffic.received(reply.client, reply.length)
                continue
            # nobody asked it, or it answered before
            if silent.get(reply.client, NOT_ASKED) == NOT_ASKED:
                continue
            silent[reply.client] = reply.error or "no payload"
            if reply.payload is None:
                continue
            self._count_probe(reply.client, up=reply.length)
            try:
                found[reply.client] = scores_in(
                    reply.payload, expected, self.state.round + 1, self.fixed.frame
                )
                del silent[reply.client]
            except Refused as e:
                silent[reply.client] = str(e)
        self._probe = Probe(asked, silent)
        self.state = with_scores(self.state, [found.get(client) for client in asked], self.schema)

    def _count_probe(self, client: str, down: int = 0, up: int = 0) -> None:
        self.traffic.probes += down + up
        if down:
            self.traffic.sent(client, down)
        else:
            self.traffic.received(client, up)

    def plan(self) -> list[tuple[str, bytes]]:
        """The next round's (client, packet) pairs. Writes the round's ledger event before anything is sent.

        A client whose privacy budget is spent is not asked.
        """
        drawn = self.fixed.algorithm.plan(self.state, self.clients)
        if not self._probe.asked:
            self._began = time.monotonic()
        assignments = self._participation.admit(drawn)
        self._planned = {a.client: a.work for a in assignments}
        Ledger(self.run.ledger).record(self.state.round + 1, self._release().facts())
        self._participation.count(assignments)
        # one for all who train the same
        packets = {work: self._packet(*work) for work in {a.work for a in assignments}}
        for a in assignments:
            self._count_sent(a.client, len(packets[a.work]))
        return [(a.client, packets[a.work]) for a in assignments]

    def finish(self, replies: Iterable[Reply]) -> RoundReport:
        """Takes the replies as they come, refuses what is wrong, averages the rest,
        evaluates, and checkpoints.

        With fewer than `fewest` valid replies the model stays and the report has no clients.
        """
        refused, step = self._participation.refusals(), self.fixed.algorithm.step
        return self._close(lambda: step(self.state, self._accepted(replies, refused)), refused)

    def finish_secure(self, sum_up: SumUp) -> RoundReport:
        """As `finish`, where the clients' vectors were summed under secure aggregation."""
        refused, settle = self._participation.refusals(), self.fixed.algorithm.settle
        assert settle is not None, "the algorithm needs single updates"

        def step() -> tuple[State, RoundReport]:
            found = sum_up(refused)
            return settle(self.state, found.vector, found.clients)

        return self._close(step, refused)

    def _close(self, step: Callable[[], tuple[State, RoundReport]], refused: dict[str, str]) -> RoundReport:
        """Ends the round; a step that does not come out, or has too few clients in it,
        leaves the model as it was.
        """
        need, void = fewest(self.job), ""
        same, empty = (
            replace(self.state, round=self.state.round + 1),
            RoundReport(self.state.round + 1, (), 0.0, {}),
        )
        try:
            state, report = step()
            if len(report.clients) < need:
                void = (
                    f"{len(report.clients)} updates, a secure sum needs {need}"
                    if self.secure
                    else "too few replies"
                )
        except EmptyCohort:
            state, report = same, empty
        except (Refused, SecAggFailed) as e:
            state, report, void = (
                same,
                replace(empty, clients=tuple(c for c in self._planned if c not in refused)),
                str(e),
            )
        refused |= report.refused
        if void:
            refused |= {c: f"round void: {void}" for c in report.clients}
            # clients have moved theirs, whatever becomes of the round
            state, report = replace(same, arrays=same.arrays | controls_of(state.arrays)), empty
        for silent in set(self._planned) - set(report.clients) - refused.keys():
            refused[silent] = "no reply"
        self.state = state
        report = replace(report, refused=refused)
        self._record(report)
        return report

    def _release(self) -> Release:
        if self.privacy is None:
            return Release(release="updates", mechanism="none", unit="none", clients=len(self._planned))
        return self.privacy.release(tuple(self._planned), float(self.state.slots.get(CLIP, 0.0)))

    def _packet(self, units: tuple[str, ...], rank: int) -> bytes:
        return encode(
            "model",
            self.schema,
            self._held(rank),
            round=self.state.round + 1,
            frame=self.fixed.frame,
            train=tensors_of(self.schema, units, rank),
        )

    def _held(self, rank: int) -> Arrays:
        """What of the model a client of this rank has; 0: all."""
        return {t.name: self.state.arrays[t.name] for t in self.schema.held(rank).tensors}

    def _count_sent(self, client: str, size: int) -> None:
        first = self.fixed.frame_bytes if self.traffic.rounds.get(client, 0) == 0 else 0
        self.traffic.sent(client, size + first)
        self.traffic.rounds[client] = self.traffic.rounds.get(client, 0) + 1

    def _accepted(self, replies: Iterable[Reply], refused: dict[str, str]) -> Iterator[Update]:
        seen: set[str] = set()
        center = norm(self.state.arrays)
        assigned = {work: self._tensors(*work) for work in set(self._planned.values())}
        for reply in replies:
            self.on_reply(reply)
            if reply.late:
                self.traffic.late += 1
                self.traffic.received(reply.client, reply.length)
                continue
            try:
                yield self._update(reply, assigned, seen, center)
                seen.add(reply.client)
            except Refused as e:
                refused.setdefault(reply.client, str(e))

    def _tensors(self, units: tuple[str, ...], rank: int) -> list[int] | None:
        """As the header of an update of these units by a client of this rank names them."""
        found = tensors_of(self.schema, units, rank)
        return None if found is None else places(self.schema, found)

    def _update(
        self, reply: Reply, assigned: Mapping[Work, list[int] | None], seen: set[str], center: float
    ) -> Update:
        if reply.client not in self._planned:
            raise Refused("client", "was not asked this round")
        if reply.payload is None and reply.packet is None:
            raise Refused("failed", reply.error or "no payload")
        if self.secure is None:
            self.traffic.received(reply.client, reply.length)
        else:  # of a simulation: what the messages of the protocol would have been
            up, down = message_bytes(self.secure, len(self._planned))
            self.traffic.received(reply.client, up)
            self.traffic.sent(reply.client, down)
        if reply.client in seen:
            raise Refused("duplicate", "a second reply to the same round")
        packet = reply.packet
        if packet is None:
            packet = decode(
                reply.payload or b"",
                self.schema,
                kinds=["update"],
                round=self.state.round + 1,
                frame=self.fixed.frame,
                copy=False,
            )
        require_assigned(packet, self.schema, assigned[self._planned[reply.client]])
        if self.secure is None:  # else nobody but the client sees it, which clips it
            self._within_limits(packet, center)
        return Update(reply.client, packet.header.round, packet.arrays, packet.header.weight, packet.metrics)

    def _within_limits(self, packet: Packet, center: float) -> None:
        """`center`: the L2 norm of the model."""
        require_within_limits(packet, self.job, self.state.arrays, center)

    def _record(self, report: RoundReport) -> None:
        """Under privacy the new model is on the disk before anything is made of it. A round that a crash
        repeats draws its noise again, and two noisy versions of one sum would tell more than the one that is
        charged: so nobody sees a version that is not the one kept.
        """
        line = round_line(report, None, self.traffic, 0.0) | self._trained(report) | self.more(report)
        if self.privacy is not None:
            self.run.save(Checkpoint(self.state, self.traffic.dump(), line))
        self._show(line)

    def _trained(self, report: RoundReport) -> dict[str, Any]:
        return trained_in(self.job, self.schema, report, self._planned, self._probe, self.state)

    def _show(self, line: dict[str, Any]) -> None:
        """Metrics line, then checkpoint: a crash between them writes the same line again."""
        line = (
            line
            | held_out_of(self.fixed.evaluate(self.state.round, self.state.arrays))
            | {"seconds": round(time.monotonic() - self._began, 3)}
        )
        self.run.append_metrics(line)
        self.run.save(Checkpoint(self.state, self.traffic.dump()))
        self.on_round(line)


def start(
    job: Job,
    run: RunFolder,
    schema: Schema,
    frame_digest: str,
    frame_bytes: int,
    algorithm: Algorithm,
    clients: Sequence[ClientInfo],
    initial: Callable[[], Arrays],
    evaluate: Evaluate,
    traffic: Traffic | None = None,
    privacy: PrivacyPlan | None = None,
) -> Coordinator:
    """A coordinator at the folder's newest checkpoint, or at round 0 from `initial()`.

    `traffic`: bytes spent before round 1.

    Raises RunError when the ledger or the metrics of the rounds before the checkpoint are gone or changed.
    """
    found = run.newest()
    if found is None:
        state, traffic = algorithm.init(initial()), traffic or Traffic()
    else:
        state, traffic = found.state, Traffic(**found.counters)
        require_whole(run.ledger, state.round, 0 if job.adapter.asks_gradients else 1)
        run.require_metrics(found)
    asked = (
        [(event.round, sorted(read(event.facts).names)) for event in Ledger(run.ledger).events()]
        if privacy
        else []
    )
    joined = Counter(name for round, names in asked if 0 < round <= state.round for name in names)
    aborted = [names for round, names in asked if round > state.round]
    return Coordinator(
        Fixed(
            job, schema, frame_digest, frame_bytes, algorithm, run, evaluate, privacy, secure_of(job, schema)
        ),
        state,
        traffic,
        clients,
        _participation=Participation(privacy.budget if privacy else 0, joined, aborted),
        _unfinished=found.unfinished if found else None,
    )
