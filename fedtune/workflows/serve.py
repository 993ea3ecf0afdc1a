"""fedtune server: the coordinator service, its queue of jobs and the runs they become. Imports no torch.

HOME/ca.crt server.crt server.key devices/NAME.pub  from `fedtune provision`
HOME/jobs/001-METHOD-HASH/                          bundles, in the order they are run
HOME/runs/001-METHOD-HASH/                          their run folders
HOME/superlink.sqlite                               Flower's state
HOME/service.json                                   what the service does now (`fedtune status`)
"""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.adapters.frames import from_gradients
from fedtune.algorithms.units import Limits, limits_of, unlimited
from fedtune.bundles.bundle import Bundle, open_bundle, write_bundle
from fedtune.common.metrics import merge, plausible, split_personal, value, with_personal
from fedtune.common.storage import failing_clearly, lock, write_atomic, write_json
from fedtune.errors import EnvironmentProblem, FedtuneError, PrivacyRefused, Refused, RunError, UserError
from fedtune.job import Job
from fedtune.privacy.contribution import message_bytes, secure_of
from fedtune.privacy.plan import PrivacyPlan, fewest, plan_of
from fedtune.process.waits import DESK_SECONDS, GRID_POLL, LOBBY_POLL, QUEUE_POLL, ROSTER_POLL, STAGE_SECONDS
from fedtune.provision import days_left, load_devices
from fedtune.round.algorithm import make_algorithm
from fedtune.round.checks import most_predictions
from fedtune.round.coordinator import Coordinator, start
from fedtune.round.gradient_init import gather_gradients, gradient_schema
from fedtune.round.lines import evaluated
from fedtune.round.loop import run_rounds
from fedtune.round.replies import Pairs, Reply
from fedtune.round.traffic import Traffic
from fedtune.round.watch import Watch
from fedtune.runs.folder import RunFolder, create_run, open_run, versions
from fedtune.secagg.terms import session_of
from fedtune.server.app import GridExchange
from fedtune.server.lobby import Guest, Lobby
from fedtune.server.secure import SecureRounds
from fedtune.server.superlink import LinkGrid, SuperLink, Tls, superlink
from fedtune.stateful.methods import method_of
from fedtune.types import Arrays, Metrics
from fedtune.wire import Schema, decode, encode, packet_bytes
from fedtune.workflows.privacy import LIGHT, spent_so_far
from fedtune.workflows.summary import client_row, facts, final_of, follow, personal_of, write_summary

log = logging.getLogger(__name__)
_NAMED = re.compile(r"\d{3,}-")
DONE = "done"  # marks a bundle of the queue that was run
EXPIRY_DAYS = 30  # of the certificate, from which a warning is given at the start
REQUEST_ROOM = 2**20  # bytes a device's request may be larger than an update


@dataclass(frozen=True)
class Entry:
    """A job of the queue."""

    name: str
    bundle: Path
    run: Path

    @property
    def finished(self) -> bool:
        """It was run to its end; also when its run folder was taken away since."""
        if (self.bundle / DONE).exists():
            return True
        with contextlib.suppress(OSError, ValueError):
            return bool(json.loads((self.run / "summary.json").read_text())["complete"])
        return False


@dataclass(frozen=True)
class Home:
    """The coordinator's folder."""

    path: Path

    @property
    def tls(self) -> Tls:
        return Tls(self.path / "server.crt", self.path / "server.key")

    @property
    def devices(self) -> Path:
        return self.path / "devices"

    @property
    def service(self) -> Path:
        return self.path / "service.json"

    def require_keys(self) -> None:
        """Raises UserError when a file that TLS or device keys need is missing."""
        for part in (self.tls.certificate, self.tls.key, self.devices):
            if not part.exists():
                raise UserError(
                    f"{part}: is missing; give --dir the server folder that `fedtune provision` made, "
                    "or --insecure on 127.0.0.1"
                )

    def entries(self) -> list[Entry]:
        jobs = self.path / "jobs"
        names = (
            [p.name for p in jobs.iterdir() if _NAMED.match(p.name) and (p / "manifest.json").exists()]
            if jobs.exists()
            else []
        )
        return [Entry(name, jobs / name, self.path / "runs" / name) for name in sorted(names, key=_number)]

    def find(self, job_sha256: str) -> Entry | None:
        """The newest entry of the same job."""
        same = [e for e in self.entries() if open_bundle(e.bundle).manifest.job_sha256 == job_sha256]
        return same[-1] if same else None

    def enqueue(self, bundle: Bundle) -> Entry:
        """Copies a bundle to the end of the queue, whole or not at all."""
        job = bundle.job
        _ = bundle.frame, bundle.initial
        jobs = self.path / "jobs"
        with failing_clearly(jobs):
            jobs.mkdir(parents=True, exist_ok=True)
            number = max([0, *(_number(e.name) for e in self.entries())]) + 1
            name = f"{number:03d}-{job.adapter.method}-{bundle.digest[:8]}"
            beside = Path(tempfile.mkdtemp(dir=jobs, prefix=".new-"))
            shutil.copytree(bundle.folder, beside, dirs_exist_ok=True)
            beside.rename(jobs / name)
        return Entry(name, jobs / name, self.path / "runs" / name)

    def locked(self) -> contextlib.AbstractContextManager[bool]:
        """Whether this process is now the service of this folder; another may be."""
        with failing_clearly(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        return lock(self.path / ".lock")


class Roster:
    """The devices that are let in: those whose .pub lies in the folder,
    looked at again whenever it changes.
    """

    def __init__(self, link: SuperLink, folder: Path) -> None:
        self._link, self._folder, self._trouble, self._looked = link, folder, "", -ROSTER_POLL
        self._seen: tuple[tuple[str, int, int], ...] | None = None
        self._names: dict[int, str] = {}

    def __call__(self) -> Mapping[int, str]:
        """Raises UserError for a folder that cannot be read the first time;
        later the devices stay as they were.
        """
        if time.monotonic() - self._looked < ROSTER_POLL:
            return self._names
        self._looked = time.monotonic()
        try:
            now = self._state()
            keys = load_devices(self._folder) if now != self._seen else None
        except (OSError, FedtuneError) as e:
            if self._seen is None:
                raise
            now, keys = self._seen, None
            if str(e) != self._trouble:
                log.warning("%s; the devices stay as they were", e)
            self._trouble = str(e)
        if keys is not None:
            before = self._names
            self._names = {self._link.register(name, key): name for name, key in keys.items()}
            allowed = set(keys.values())
            for key, node in self._link.registered().items():
                if key not in allowed:
                    self._link.unregister(node)
                    log.warning(
                        "device %s is no longer let in: its key is not in %s",
                        before.get(node, f"node {node}"),
                        self._folder,
                    )
            self._seen, self._trouble = now, ""
        return self._names

    def _state(self) -> tuple[tuple[str, int, int], ...]:
        """Changes with every file that comes, goes, or is written over."""
        with os.scandir(self._folder) as found:
            files = [(f.name, f.stat()) for f in found if f.name.endswith(".pub")]
        return tuple(sorted((name, s.st_mtime_ns, s.st_size) for name, s in files))


@dataclass
class Desk:
    """What the service does now, for `fedtune status`: written to service.json, at most so often."""

    path: Path
    facts: dict[str, Any]
    listen: Callable[[dict[str, Any]], None] = lambda facts: None
    _written: float = 0.0

    def note(self, **facts: Any) -> None:
        self.facts |= facts
        self.listen(self.facts)
        write_json(self.path, self.facts | {"now": datetime.now(UTC).isoformat(timespec="seconds")})
        self._written = time.monotonic()

    def tick(self, **facts: Any) -> None:
        """As `note`, when something is new or the file is some seconds old."""
        if (
            any(self.facts.get(k) != v for k, v in facts.items())
            or time.monotonic() - self._written > DESK_SECONDS
        ):
            self.note(**facts)


@dataclass
class Live:
    """One job being run with the devices that come."""

    bundle: Bundle
    run: RunFolder
    link: SuperLink
    grid: LinkGrid
    roster: Roster | None
    desk: Desk
    watch: Watch
    traffic: Traffic = field(default_factory=Traffic)
    scores: dict[str, Metrics] = field(default_factory=dict)
    personal: dict[str, Metrics] = field(default_factory=dict)
    """Of the last evaluation, by device: of the global model, and of what devices keep for themselves."""
    _looked: float = 0.0
    _began: bool = False

    def __post_init__(self) -> None:
        self.job = self.bundle.job
        self.schema = self.bundle.schema
        self.lobby = Lobby(self.link, self.grid, self.bundle, self.roster, self._changed, self._sent)
        self.exchange = self._exchange(self.job.federation.deadline)
        self.coordinator = start(
            self.job,
            self.run,
            self.schema,
            self.bundle.frame_digest,
            self.bundle.frame_bytes,
            make_algorithm(
                self.job, self.schema, self._limits, 0 if self.roster is None else len(self.roster())
            ),
            (),
            lambda: self.bundle.start,
            self.evaluate,
            self.traffic,
            self._plan(),
        )
        self.coordinator.can_probe = lambda client: unlimited(self.schema, self._limits(client).depth)
        self.traffic = self.coordinator.traffic  # of the checkpoint, on a run that continues
        self.desk.note(epsilon=spent_so_far(self.run, self.coordinator.privacy))
        follow(self.coordinator, replace(self.watch, line=self._noted))

    def _limits(self, client: str) -> Limits:
        """Those of the class that the device says it is of."""
        return limits_of(self.lobby.device(client))

    def gradient_bundle(self) -> Bundle:
        """Asks devices for the first step's gradients and makes the run's bundle,
        with the frame that they give.
        """
        spec, manifest = self.bundle.manifest.spec, self.bundle.manifest
        self.watch.stage(
            f"asking {self.job.adapter.init_clients} devices for the gradient of the first step", 0
        )
        self.gather(self.coordinator)
        gradients, traffic = gather_gradients(
            self.job, spec, self.run, self.coordinator.clients, self.exchange, self.coordinator.privacy
        )
        frame, first = from_gradients(spec, gradients, self.job.adapter.init_step)
        self.traffic = replace(traffic, offers=self.traffic.offers)
        self.run.keep_start(self.traffic.dump())
        return write_bundle(
            self.run.bundle,
            self.job,
            frame,
            self.bundle.initial | first,
            source=manifest.source,
            sha256=manifest.sha256,
            licence=manifest.licence,
            parameters=manifest.parameters,
            task=manifest.task,
            labels=manifest.labels,
            spec=spec,
            versions=manifest.versions,
            weights=manifest.weights,
        )

    def rounds(self) -> None:
        run_rounds(self.coordinator, self.ask, self.gather, self._through())

    def _through(self) -> SecureRounds | None:
        """How a round goes where its updates are summed securely."""
        if self.coordinator.secure is None:
            return None
        later = self._exchange(min(self.job.federation.deadline, STAGE_SECONDS))
        return SecureRounds(
            self.coordinator.secure,
            session_of(self.bundle.digest),
            self.ask,
            later,
            lambda: {info.name for info in self.lobby.ready()},
        )

    def _exchange(self, deadline: float) -> GridExchange:
        return GridExchange(
            self.grid,
            deadline,
            lambda grid, names: self.lobby.nodes(list(names)),
            {"job": self.bundle.digest},
            GRID_POLL,
            self.look,
        )

    def ask(self, pairs: Pairs, round: int) -> Iterator[Reply]:
        self.desk.note(
            state="training",
            round=round - 1,
            deadline_at=time.time() + self.job.federation.deadline,
            asked=len(pairs),
        )
        yield from self.exchange(pairs, round=round)

    def look(self) -> None:
        """Sees to the lobby, now and then."""
        if time.monotonic() - self._looked >= LOBBY_POLL:
            self.lobby.visit()
            self.desk.tick(devices=_shown(self.lobby))
            self._looked = time.monotonic()

    def gather(self, coordinator: Coordinator) -> None:
        """Waits until as many devices are ready as a round needs.

        Raises EnvironmentProblem after server.wait seconds.
        """
        need, end = needed(self.job), time.monotonic() + self.job.server.wait
        self.look()
        waited = not self._began
        while len(ready := self.lobby.ready()) < need:
            waited = True
            if time.monotonic() > end:
                raise EnvironmentProblem(
                    f"{len(ready)} of {need} devices were ready after server.wait = {self.job.server.wait:g} "
                    "s; nothing is lost: the same command continues the run"
                )
            self.desk.tick(state="waiting", ready=len(ready), need=need)
            time.sleep(LOBBY_POLL)
            self.look()
        if waited:
            self.watch.stage(
                "training",
                (self.job.federation.rounds - coordinator.state.round) * self.job.federation.cohort,
            )
        self._began, coordinator.clients = True, ready

    def evaluate(self, round: int, arrays: Arrays) -> Metrics | None:
        """Held-out metrics over the devices that are ready, in the rounds the job evaluates.

        The data stay where they are.
        """
        # scores of devices' held-out examples come one by one and have no noise
        if not evaluated(self.job, round) or self.job.privacy.hides_clients:
            return None
        packet = encode("model", self.schema, arrays, round=round, frame=self.bundle.frame_digest)
        names = [info.name for info in self.lobby.ready()]
        self.desk.note(state="evaluating")
        self.coordinator.traffic.evaluation += len(packet) * len(names)
        found: dict[str, Metrics] = {}
        personal: dict[str, Metrics] = {}
        for reply in self.exchange([(name, packet) for name in names], kind="evaluate", round=round):
            if reply.payload is None or reply.late:
                continue
            self.coordinator.traffic.evaluation += len(reply.payload)
            with contextlib.suppress(Refused):
                scores = decode(
                    reply.payload, Schema(()), kinds=["scores"], round=round, frame=self.bundle.frame_digest
                ).metrics
                ours, own = split_personal(scores)
                if all(plausible(part, most_predictions(self.job)) for part in (ours, own)):
                    found[reply.client], personal[reply.client] = ours, own
                else:
                    log.warning("%s: scores that cannot be are left out", reply.client)
        self.scores = {
            name: found[name] for name in sorted(found) if found[name].get("accuracy", (0.0, 0.0))[1] > 0
        }
        self.personal = {
            name: own for name in self.scores if (own := personal[name]).get("accuracy", (0.0, 0.0))[1] > 0
        }
        if not self.scores:
            return None
        metrics = merge(list(self.scores.values()))
        return (
            with_personal(metrics, list(self.personal.values())) if method_of(self.job).personal else metrics
        )

    def finish(self) -> dict[str, Any]:
        """Writes summary and page.

        The final scores are those of the last evaluation, made again if a crash lost them.
        """
        if not self.scores:
            self.look()
            self.evaluate(self.job.federation.rounds, self.coordinator.state.arrays)
        held = {g.name: g for g in self.lobby.guests.values()}
        summary = facts(self.run, LIGHT) | {
            "engine": "live",
            "split": [
                {"name": n, "natural": None, "train": g.examples, "held_out": g.held_out, "labels": []}
                for n, g in sorted(held.items())
            ],
            "final": final_of(
                merge(self.scores.values()),
                [client_row(n, m, int(m["accuracy"][1])) for n, m in self.scores.items()],
            ),
            "baselines": {},
            "complete": True,
        }
        if method_of(self.job).personal:
            beside = [self.scores[name] for name in self.personal]
            summary["personal"] = personal_of(
                merge(self.personal.values()),
                merge(beside),
                [value(m, "accuracy") for m in self.personal.values()],
                len(held),
                int(sum(m["accuracy"][1] for m in beside)),
            )
        write_summary(self.run, summary)
        return summary

    def _plan(self) -> PrivacyPlan | None:
        """Raises PrivacyRefused for a job whose delta is too large for the devices that are let in, or
        that counts on cohorts nobody knows.
        """
        if self.job.privacy.amplification:
            raise PrivacyRefused(
                "privacy.amplification = true: devices come when they can and are not drawn from all, "
                "so sampling hides nothing here; remove the key"
            )
        return plan_of(self.job, len(self.roster()) if self.roster is not None else 0)

    def _noted(self, line: dict[str, Any]) -> None:
        before = self.desk.facts["epsilon"]  # what is infinite stays so
        epsilon = before if before == "inf" else spent_so_far(self.run, self.coordinator.privacy)
        self.desk.note(round=line["round"], line=line, deadline_at=None, epsilon=epsilon)
        self.watch.line(line)

    def _sent(self, size: int) -> None:
        self.traffic.offers += size

    def _changed(self, guest: Guest) -> None:
        self.desk.note(devices=_shown(self.lobby))


def serve(
    home: Home,
    address: tuple[str, int],
    insecure: bool,
    stay: bool,
    watch: Callable[[Entry, RunFolder, Bundle], Watch],
    listen: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """Runs the queue; yields each entry with its summary as it is finished.

    Ends with the queue, or with `stay` never.
    """
    desk = Desk(
        home.service,
        {
            "pid": os.getpid(),
            "address": f"{address[0]}:{address[1]}",
            "insecure": insecure,
            "state": "starting",
            "devices": [],
            "job": None,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "queue": [],
        },
        listen,
    )
    tls = None if insecure else home.tls
    with superlink(*address, home.path / "superlink.sqlite", tls, REQUEST_ROOM) as link:
        roster = None if insecure else Roster(link, home.devices)
        if roster is not None:
            roster()
        _warn_of_expiry(home, insecure)
        while True:
            waiting = [e for e in home.entries() if not e.finished]
            if not waiting:
                desk.note(state="idle", job=None, epsilon=None, queue=[], devices=[])
                if not stay:
                    return
                if roster is not None:
                    roster()
                time.sleep(QUEUE_POLL)
                continue
            entry = waiting[0]
            summary = _run(entry, link, roster, desk, watch, [e.name for e in waiting[1:]])
            write_atomic(entry.bundle / DONE, b"")
            yield entry, summary


def needed(job: Job) -> int:
    """Devices without which no round begins."""
    return max(job.federation.min_replies, fewest(job))


def _warn_of_expiry(home: Home, insecure: bool) -> None:
    left = None if insecure else days_left(home.tls.certificate)
    if left is not None and left < EXPIRY_DAYS:
        what = f"expires in {left:.0f} days" if left > 0 else "has expired: devices refuse it"
        log.warning("%s: %s; renew it with `fedtune provision renew`", home.tls.certificate, what)


def _run(
    entry: Entry,
    link: SuperLink,
    roster: Roster | None,
    desk: Desk,
    watch: Callable[[Entry, RunFolder, Bundle], Watch],
    queue: list[str],
) -> dict[str, Any]:
    bundle = open_bundle(entry.bundle)
    run = _open_run(entry, bundle)
    spec = bundle.manifest.spec
    asks, secure = (
        gradient_schema(spec) if bundle.job.adapter.asks_gradients else Schema(()),
        secure_of(bundle.job, bundle.schema),
    )
    summed = message_bytes(secure, secure.cohort)[0] if secure else 0
    link.body_limit = (
        max(packet_bytes(bundle.schema)[1], 4 * sum(t.size for t in asks.tensors), summed) + REQUEST_ROOM
    )
    desk.note(
        state="waiting",
        job=entry.name,
        run=str(run.path),
        rounds=bundle.job.federation.rounds,
        round=None,
        line=None,
        epsilon=None,
        queue=queue,
        scored=not bundle.job.privacy.hides_clients,
        ready=0,
        need=needed(bundle.job),
    )
    with run.locked(), link.run() as grid:
        watching, traffic = watch(entry, run, bundle), Traffic()
        if bundle.job.adapter.asks_gradients:
            if run.newest() is None and (begun := run.start()) is not None:
                traffic = Traffic(**begun)
            elif run.newest() is None:
                asking = Live(bundle, run, link, grid, roster, desk, watching)
                asking.gradient_bundle()
                traffic = asking.traffic
            bundle = open_bundle(run.bundle)
        live = Live(bundle, run, link, grid, roster, desk, watching, traffic)
        live.rounds()
        return live.finish()


def _open_run(entry: Entry, bundle: Bundle) -> RunFolder:
    """The entry's run folder, made or found. Raises RunError when it is another job's."""
    if not (entry.run / "run.json").exists():
        create_run(
            entry.run,
            bundle.job,
            {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": versions(),
                "sha256": bundle.manifest.sha256,
                "split": [],
            },
        )
    run = open_run(entry.run)
    run.require_own_job()
    if bundle.job.adapter.asks_gradients:  # its bundle is made with the devices
        return run
    if not (run.bundle / "manifest.json").exists():
        with failing_clearly(run.bundle):
            shutil.copytree(entry.bundle, run.bundle, dirs_exist_ok=True)
    if open_bundle(run.bundle).digest != bundle.digest:
        raise RunError(
            f"{run.path}: was begun with another bundle; restore it, or remove {entry.bundle} from the queue"
        )
    return run


def _number(name: str) -> int:
    return int(name.partition("-")[0])


def _shown(lobby: Lobby) -> list[dict[str, Any]]:
    return [
        {
            "name": g.name,
            "state": g.state,
            "online": g.online,
            "reason": g.reason,
            "examples": g.examples,
            "held_out": g.held_out,
            "class": g.kind,
        }
        for g in lobby.guests.values()
    ]
