"""The coordinator's side of a round, without any transport: plan, check what comes back,
step, record, checkpoint.

An engine asks `plan` for (client, packet) pairs, has them answered in any way it likes, and gives the replies
to `finish`. All engines run this same object.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from fedtune.aggregation import robust
from fedtune.aggregation.mean import Mean
from fedtune.algorithms import Algorithm, State, dp_fed_avg, fed_avg, secure_avg
from fedtune.algorithms.dp_fed_avg import CLIP
from fedtune.algorithms.probes import SCORES, answers
from fedtune.algorithms.server_optimizers import with_server_optimizer
from fedtune.algorithms.units import (
    AS_THE_JOB,
    ROWS,
    LimitsOf,
    begins_with_probe,
    ranked,
    selecting,
    tensors_of,
    with_scores,
)
from fedtune.common.metrics import PERSONAL_CLIENTS, plausible, value
from fedtune.common.trees import norm, subtract
from fedtune.errors import EmptyCohort, Refused, SecAggFailed
from fedtune.job import Job
from fedtune.privacy.client import client_privacy
from fedtune.privacy.contribution import Secure, message_bytes, secure_of
from fedtune.privacy.noise import noise_of
from fedtune.privacy.plan import Plan, fewest
from fedtune.privacy.releases import Release, read
from fedtune.runs.checkpoint import Checkpoint
from fedtune.runs.folder import RunFolder
from fedtune.runs.ledger import Ledger, require_whole
from fedtune.secagg.server import Sum
from fedtune.stateful.scaffold import controls_of, steering
from fedtune.stateful.select import held_mean
from fedtune.tasks import task_named
from fedtune.types import Arrays, Assignment, ClientInfo, Metrics, RoundReport, Update, Work
from fedtune.wire import Packet, Schema, decode, encode, places


@dataclass(frozen=True)
class Reply:
    """What came back from a client: a payload, or the reason there is none."""

    client: str
    payload: bytes | None
    error: str = ""
    late: bool = False
    """It answers a round that is over: counted, and not used."""
    packet: Packet | None = None
    size: int = 0
    """From an engine in this process: what the payload would have held, as read,
    and how long it would have been.
    """

    @property
    def length(self) -> int:
        """Bytes that came, or would have."""
        return self.size or len(self.payload or b"")


@dataclass
class Traffic:
    """Bytes by client, as serialised, and who holds the frame.

    `down` counts the frame on a client's first round.
    """

    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    messages: int = 0
    late: int = 0
    evaluation: int = 0
    offers: int = 0
    """Bytes beside the rounds, live only: of evaluation, both ways,
    and of job offers and bundles without the frame.
    """
    probes: int = 0
    """Of `up` and `down`, what probes took."""

    def sent(self, client: str, size: int) -> None:
        self.messages += 1
        self.down[client] = self.down.get(client, 0) + size

    def received(self, client: str, size: int) -> None:
        self.messages += 1
        self.up[client] = self.up.get(client, 0) + size

    @property
    def total(self) -> int:
        return sum(self.up.values()) + sum(self.down.values())

    def dump(self) -> dict:
        return {
            "up": self.up,
            "down": self.down,
            "rounds": self.rounds,
            "messages": self.messages,
            "late": self.late,
            "evaluation": self.evaluation,
            "offers": self.offers,
            "probes": self.probes,
        }


@dataclass(frozen=True)
class Watch:
    """What a caller may follow, in the thread that runs the rounds.

    stage(text, total): work of `total` steps begins, of which advance(count) finishes some; total 0
    is unknown. reply: a client's answer came. line: a round is finished, as metrics.jsonl has it.
    note: one line worth knowing.
    """

    stage: Callable[[str, int], None] = lambda text, total: None
    advance: Callable[[int], None] = lambda count: None
    reply: Callable[[Reply], None] = lambda reply: None
    line: Callable[[dict], None] = lambda line: None
    note: Callable[[str], None] = lambda text: None


_NOT_PROBED = "not asked, as it cannot go down to the first block"
SumUp = Callable[[dict[str, str]], Sum]
"""Takes a round to its secure sum and notes in the dict why which clients are not in it.

Raises SecAggFailed when it does not open.
"""
Evaluate = Callable[[int, Arrays], Metrics | None]
"""(finished rounds, model) -> held-out metrics, or None in a round that is not evaluated."""


@dataclass
class Coordinator:
    """Runs rounds on one run folder.

    Make it with `start`; it continues from the folder's newest checkpoint.
    """

    job: Job
    schema: Schema
    frame_digest: str
    frame_bytes: int
    algorithm: Algorithm
    clients: Sequence[ClientInfo]
    run: RunFolder
    evaluate: Evaluate
    state: State
    traffic: Traffic
    on_round: Callable[[dict], None] = lambda line: None
    on_reply: Callable[[Reply], None] = lambda reply: None
    more: Callable[[RoundReport], dict] = lambda report: {}
    """What a round's line says besides, or in another way, where the clients are simulated."""
    can_probe: Callable[[str], bool] = lambda client: True
    """Whether a client can answer a probe; others are not asked."""
    privacy: Plan | None = None
    secure: Secure | None = None
    """How updates are summed, where single ones are not to be seen."""
    _joined: Counter[str] = field(default_factory=Counter)
    """Under privacy: rounds that each client was asked in, as the ledger has them."""
    _aborted: Sequence[list[str]] = ()
    """Whom the next round had asked when the process before this one ended."""
    _spent: tuple[str, ...] = ()
    _planned: dict[str, Work] = field(default_factory=dict)
    """Of the round that is under way: the clients asked, and what each trains."""
    _unfinished: dict[str, Any] | None = None
    """Of a round whose model the process before this one stored and may not have scored."""
    _began: float = 0.0
    _asked: tuple[str, ...] = ()
    """Those drawn for the probe that the round under way began with."""
    _silent: dict[str, str] = field(default_factory=dict)
    """Of them, those without an answer that counts, and why."""

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
        self._asked = ()
        if not begins_with_probe(self.job, self.state.round + 1):
            return []
        self._began = time.monotonic()
        ranks = {a.client: a.rank for a in self.algorithm.plan(self.state, self.clients)}
        self._asked = tuple(ranks)
        able = [client for client in ranks if self.can_probe(client)]
        if not able:
            self.probed(())
            return []
        packets = {
            rank: encode(
                "probe", self.schema, self._held(rank), round=self.state.round + 1, frame=self.frame_digest
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
        found, expected = dict[str, np.ndarray](), answers(self.schema)
        self._silent = {
            client: "no reply" if self.can_probe(client) else _NOT_PROBED for client in self._asked
        }
        for reply in replies:
            if reply.late:
                self.traffic.late += 1
                self.traffic.received(reply.client, reply.length)
                continue
            # nobody asked it, or it answered before
            if self._silent.get(reply.client, _NOT_PROBED) == _NOT_PROBED:
                continue
            self._silent[reply.client] = reply.error or "no payload"
            if reply.payload is None:
                continue
            self._count_probe(reply.client, up=reply.length)
            try:
                scores = decode(
                    reply.payload,
                    expected,
                    kinds=["block-scores"],
                    round=self.state.round + 1,
                    frame=self.frame_digest,
                ).arrays[SCORES]
            except Refused as e:
                self._silent[reply.client] = str(e)
                continue
            if (scores >= 0).all() and scores.any():
                found[reply.client] = scores
                del self._silent[reply.client]
            else:
                self._silent[reply.client] = (
                    "scores: a negative one"
                    if scores.any()
                    else "scores: all are 0, as of a client with too few examples"
                )
        self.state = with_scores(self.state, [found.get(client) for client in self._asked], self.schema)

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
        drawn = self.algorithm.plan(self.state, self.clients)
        if not self._asked:
            self._began = time.monotonic()
        assignments = self._within_budget(drawn)
        # who was asked then may have answered: that counts, too
        if self._aborted and sorted(a.client for a in assignments) not in self._aborted:
            self._joined.update(name for names in self._aborted for name in names)
            assignments = self._within_budget(drawn)
        self._aborted = ()
        self._planned = {a.client: a.work for a in assignments}
        Ledger(self.run.ledger).record(self.state.round + 1, self._release().facts())
        self._joined.update(a.client for a in assignments)
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
        refused = self._out_of_budget()
        return self._close(lambda: self.algorithm.step(self.state, self._accepted(replies, refused)), refused)

    def finish_secure(self, sum_up: SumUp) -> RoundReport:
        """As `finish`, where the clients' vectors were summed under secure aggregation."""
        refused, settle = self._out_of_budget(), self.algorithm.settle
        assert settle is not None, "the algorithm needs single updates"

        def step() -> tuple[State, RoundReport]:
            found = sum_up(refused)
            return settle(self.state, found.vector, found.clients)

        return self._close(step, refused)

    def _out_of_budget(self) -> dict[str, str]:
        return {
            name: f"privacy: its budget of {self.privacy.budget if self.privacy else 0} rounds is spent"
            for name in self._spent
        }

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

    def _within_budget(self, drawn: Sequence[Assignment]) -> list[Assignment]:
        most = self.privacy.budget if self.privacy else 0
        self._spent = tuple(a.client for a in drawn if most and self._joined[a.client] >= most)
        return [a for a in drawn if a.client not in self._spent]

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
            frame=self.frame_digest,
            train=tensors_of(self.schema, units, rank),
        )

    def _held(self, rank: int) -> Arrays:
        """What of the model a client of this rank has; 0: all."""
        return {t.name: self.state.arrays[t.name] for t in self.schema.held(rank).tensors}

    def _count_sent(self, client: str, size: int) -> None:
        first = self.frame_bytes if self.traffic.rounds.get(client, 0) == 0 else 0
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
                frame=self.frame_digest,
                copy=False,
            )
        self._require_assigned(packet, assigned[self._planned[reply.client]])
        if self.secure is None:  # else nobody but the client sees it, which clips it
            self._within_limits(packet, center)
        return Update(reply.client, packet.header.round, packet.arrays, packet.header.weight, packet.metrics)

    def _require_assigned(self, packet: Packet, assigned: list[int] | None) -> None:
        if packet.header.tensors != assigned:
            wanted = (
                "all were"
                if assigned is None
                else (
                    f"{len(assigned)}, from {self.schema.tensors[assigned[0]].name} "
                    f"to {self.schema.tensors[assigned[-1]].name}, were"
                )
            )
            raise Refused(
                "tensors", f"{len(packet.arrays)} of {len(self.schema.tensors)} tensors; {wanted} assigned"
            )

    def _within_limits(self, packet: Packet, center: float) -> None:
        """`center`: the L2 norm of the model."""
        fed = self.job.federation
        if packet.header.weight > fed.max_weight:
            raise Refused(
                "weight",
                f"{packet.header.weight:g} examples claimed, federation.max-weight is {fed.max_weight:g}",
            )
        if not plausible(packet.metrics, most_predictions(self.job) * fed.local_epochs):
            raise Refused(
                "metrics", "not the sums of loss and right predictions over one number of predictions"
            )
        # |u - m| is at most |u| + |m|, and both are known: only near the limit is every difference looked at.
        # 2 % and 1e-12 are more than packet.norm and the rounding of the differences can be off.
        if 1.02 * (packet.norm + center) + 1e-12 <= fed.max_norm:
            return
        size = norm(subtract(packet.arrays, {name: self.state.arrays[name] for name in packet.arrays}))
        if not size <= fed.max_norm:
            raise Refused("norm", f"{size:.4g} from the model, federation.max-norm is {fed.max_norm:g}")

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
        """How many of the clients averaged had each rank, and trained each unit, where they are not all
        alike; and of this round's probe the mean scores, and who gave none that counts.
        """
        found: dict[str, Any] = {}
        if any(t.rank for t in self.schema.tensors):
            ranks = Counter(self._planned[client].rank or self.job.adapter.rank for client in report.clients)
            found["ranks"] = {str(rank): ranks[rank] for rank in sorted(ranks)}
        if self.job.units.strategy == "all":
            return found
        counts = Counter(unit for client in report.clients for unit in self._planned[client].units)
        found["units"] = {unit: counts[unit] for unit in self.schema.units if counts[unit]}
        if self._asked and report.round:
            found["unprobed"] = dict(self._silent)
            if len(self._silent) < len(self._asked):
                found["scores"] = dict(
                    zip(self.schema.blocks, self.state.slots[ROWS].mean(0).round(6).tolist())
                )
        return found

    def _show(self, line: dict[str, Any]) -> None:
        """Metrics line, then checkpoint: a crash between them writes the same line again."""
        line = (
            line
            | held_out_of(self.evaluate(self.state.round, self.state.arrays))
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
    privacy: Plan | None = None,
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
        job,
        schema,
        frame_digest,
        frame_bytes,
        algorithm,
        clients,
        run,
        evaluate,
        state,
        traffic,
        privacy=privacy,
        secure=secure_of(job, schema),
        _joined=joined,
        _aborted=aborted,
        _unfinished=found.unfinished if found else None,
    )


def most_predictions(job: Job) -> float:
    """The largest number of predictions a client may claim for one pass over its data."""
    return job.federation.max_weight * task_named(job.model.task).most_predictions(job.model.max_length)


def evaluated(job: Job, round: int) -> bool:
    """Whether the model after so many rounds is scored on held-out data; the last always is."""
    return round == job.federation.rounds or round % job.evaluation.every == 0


def make_algorithm(
    job: Job, schema: Schema, limits: LimitsOf = lambda client: AS_THE_JOB, population: int = 0
) -> Algorithm:
    """The algorithm object that every engine runs. limits: of each client. population: clients that could
    ever be asked (0: not known, then as many as a cohort has). Raises JobError as `require_budgets`.
    """
    inner = with_server_optimizer(_averaging(job, schema), job.federation)
    if job.federation.drift == "scaffold":
        inner = steering(inner, population or job.federation.cohort)
    return selecting(ranked(inner, limits), job, schema, limits)


def _averaging(job: Job, schema: Schema) -> Algorithm:
    fed, privacy, secure = job.federation, client_privacy(job), secure_of(job, schema)
    if secure is not None:
        return secure_avg(
            seed=fed.seed,
            cohort=fed.cohort,
            units=schema.units,
            secure=secure,
            noise=lambda round, client: noise_of(job, round, client, "sum"),
        )
    if privacy is not None:
        return dp_fed_avg(
            seed=fed.seed,
            cohort=fed.cohort,
            units=schema.units,
            sampling=fed.sampling,
            privacy=privacy,
            noise=lambda round: noise_of(job, round, ""),
            secret=job.privacy.amplification and job.privacy.noise == "system",
        )
    return fed_avg(
        seed=fed.seed,
        cohort=fed.cohort,
        units=schema.units,
        sampling=fed.sampling,
        weighting=fed.weighting,
        average=_average(job),
    )


def _average(job: Job) -> Callable[[Iterable[Update], Arrays], Mean] | None:
    """What stands in the place of the mean."""
    fed = job.federation
    if job.personal.method == "select":
        return partial(held_mean, equal=fed.weighting == "equal")
    rules: dict[str, Callable[[Iterable[Update], Arrays], Mean]] = {
        "median": robust.median,
        "trimmed-mean": lambda updates, reference: robust.trimmed_mean(updates, reference, fed.trim),
        "krum": lambda updates, reference: robust.krum(updates, reference, fed.byzantine),
        "multi-krum": lambda updates, reference: robust.krum(updates, reference, fed.byzantine, several=True),
        "norm-bound": lambda updates, reference: robust.norm_bound(updates, reference, fed.norm_bound),
    }
    return rules.get(fed.aggregation)


def round_line(
    report: RoundReport, held_out: Metrics | None, traffic: Traffic, seconds: float
) -> dict[str, Any]:
    """One round as metrics.jsonl has it. Figures that were not measured are null."""
    return {
        "round": report.round,
        "train_loss": _figure(report.metrics, "loss"),
        "train_accuracy": _figure(report.metrics, "accuracy"),
        **held_out_of(held_out),
        "up": sum(traffic.up.values()),
        "down": sum(traffic.down.values()),
        "total_bytes": traffic.total,
        "seconds": round(seconds, 3),
        "clients": list(report.clients),
        "refused": dict(report.refused),
        "late": traffic.late,
    }


def held_out_of(metrics: Metrics | None) -> dict[str, Any]:
    """What a line says of the held-out examples, and of those of clients that predict with something of
    their own by what they then get right.
    """
    found = {
        "loss": _figure(metrics, "loss"),
        "accuracy": _figure(metrics, "accuracy"),
        "evaluated": int(metrics["accuracy"][1]) if metrics else 0,
    }
    if metrics is None or PERSONAL_CLIENTS not in metrics:
        return found
    return found | {
        "personal_loss": _figure(metrics, "personal_loss"),
        "personal_accuracy": _figure(metrics, "personal_accuracy"),
        "personal_evaluated": int(metrics.get("personal_accuracy", (0.0, 0.0))[1]),
        PERSONAL_CLIENTS: int(metrics[PERSONAL_CLIENTS][0]),
    }


def _figure(metrics: Metrics | None, name: str) -> float | None:
    found = value(metrics or {}, name)
    return found if math.isfinite(found) else None
