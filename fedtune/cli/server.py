"""fedtune server: runs the coordinator service."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.bundles.bundle import Bundle, open_bundle
from fedtune.cli.common import INTERRUPTED, SetOption, UnderstandOption, overrides, shell
from fedtune.cli.journal import Journal
from fedtune.cli.simulate import round_text
from fedtune.errors import EnvironmentProblem, UserError
from fedtune.job import Job, load_job, to_toml
from fedtune.privacy.plan import resolved
from fedtune.process.address import is_loopback, parse_address
from fedtune.report.privacy import UNSCORED
from fedtune.round.replies import Reply
from fedtune.round.watch import Watch
from fedtune.runs.folder import RunFolder

EXAMPLES = (
    "Examples:  fedtune provision --host 127.0.0.1 --devices 2 -o keys   |   "
    "fedtune server job.toml --dir keys/server   |   "
    "fedtune server --dir keys/server --stay --address 0.0.0.0:9092 --metrics 127.0.0.1:9464"
)


@shell
def command(
    folder: Annotated[
        Path,
        typer.Option(
            "--dir",
            help="The coordinator's folder: keys from `fedtune provision`, and all that it keeps.",
            show_default=False,
        ),
    ],
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[JOB-OR-BUNDLE]",
            help="Job file, or bundle folder from `fedtune prepare`. Without one, runs what is queued.",
            show_default=False,
        ),
    ] = None,
    set_: SetOption = None,
    understand: UnderstandOption = False,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            help="Where to listen (default: the job's server.address).",
            show_default=False,
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS and no keys; on 127.0.0.1 only, for trying out.")
    ] = False,
    stay: Annotated[
        bool, typer.Option("--stay", help="Keep serving when the queue is empty, until stopped.")
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics", metavar="HOST:PORT", help="Serve Prometheus metrics there.", show_default=False
        ),
    ] = None,
    log_json: Annotated[
        bool,
        typer.Option("--log-json", help="One JSON object a line on standard output, for log collectors."),
    ] = False,
) -> None:
    """Starts the service, runs the job when enough devices are ready, and leaves a run folder. With a service
    already running in the folder, the job is queued there. The same command again continues after a crash.
    """
    from fedtune.workflows.serve import Home

    changes = overrides(set_, understand)
    if source is None and changes:
        raise UserError(f"{_said(changes)} changes a job file; give one")
    bundle, job = _read(source, changes)
    where = parse_address(address or job.server.address)
    if insecure and not is_loopback(where[0]):
        raise UserError(
            f"--insecure on {where[0]}: only 127.0.0.1, ::1 and localhost can do without TLS; "
            "remove --insecure and make keys with `fedtune provision`"
        )
    scrape = parse_address(metrics) if metrics else None
    home = Home(folder)
    if not insecure:
        home.require_keys()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's way to say Ctrl-C
    with home.locked() as mine, Journal(log_json) as journal:
        if mine:
            _require_free(where)
        if source is not None and not _queued(home, bundle, job, journal, mine):
            return
        if not mine:
            if source is None:
                raise UserError(
                    f"{folder}: a service runs in it already; see `fedtune status --dir {folder}`"
                )
            return
        try:
            _serve(home, where, insecure, stay, scrape, journal)
        except KeyboardInterrupt:
            journal.event("stopped", "stopped; the same command continues")
            sys.exit(INTERRUPTED)


def _require_free(where: tuple[str, int]) -> None:
    """Raises EnvironmentProblem, before any work is done, when the service could not listen there."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            *where, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[:1]:
            with socket.socket(family, kind, protocol) as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                s.bind(address)
    except OSError as e:
        raise EnvironmentProblem(
            f"cannot listen on {where[0]}:{where[1]} ({e.strerror or e}); is another service there, "
            "or is the address not this machine's? give another --address"
        ) from None


def _said(changes: list[str]) -> str:
    """The option that stands for them."""
    return "--i-understand" if changes == overrides(None, True) else "--set"


def _read(source: Path | None, changes: list[str]) -> tuple[Bundle | None, Job]:
    """The bundle, where one was given, and the job."""
    if source is None:
        return None, Job()
    if not source.is_dir():
        # as its bundle will say it, by which the queue knows it
        return None, resolved(load_job(source, changes), 0)
    if changes:
        raise UserError(
            f"{_said(changes)} cannot change {source}: a bundle is made from its job; "
            f"use `fedtune prepare JOB {_said(changes)}`"
        )
    bundle = open_bundle(_bundle_in(source))
    return bundle, bundle.job


def _bundle_in(folder: Path) -> Path:
    """A bundle, or the one in a run folder."""
    return folder / "bundle" if (folder / "bundle" / "manifest.json").exists() else folder


def _queued(home: Any, bundle: Bundle | None, job: Job, journal: Journal, mine: bool) -> bool:
    """Puts the job into the queue, unless it is there. False when there is nothing left to do."""
    text = to_toml(job)
    entry = home.find(hashlib.sha256(text.encode()).hexdigest())
    if entry is not None and bundle is not None and open_bundle(entry.bundle).digest != bundle.digest:
        entry = None
    if entry is not None and entry.finished:
        journal.event(
            "finished",
            f"this job was run already: {entry.run}; change federation.seed to run it again",
            run=str(entry.run),
        )
        return False
    if entry is not None:
        journal.event(
            "continuing",
            f"continuing {entry.name}" if mine else f"{entry.name} is in the queue already",
            job=entry.name,
        )
        return True
    with tempfile.TemporaryDirectory(prefix="fedtune-") as beside:
        made = bundle or _prepare(text, Path(beside), journal)
        entry = home.enqueue(made)
    journal.event(
        "queued",
        f"queued as {entry.name}"
        + ("" if mine else "; the running service takes it when those before it are done"),
        job=entry.name,
    )
    return True


def _prepare(text: str, folder: Path, journal: Journal) -> Bundle:
    """In a process of its own: making a bundle takes torch and the base into memory,
    which the service must not keep.
    """
    (folder / "job.toml").write_text(text)
    journal.stage("preparing the bundle")
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "fedtune.cli.main",
            "prepare",
            str(folder / "job.toml"),
            "-o",
            str(folder / "bundle"),
            "--json",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "10000"},
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("fedtune: ")
        if "No module named" in said:
            raise EnvironmentProblem(
                f"a job is made into a bundle where torch is ({said}); run `fedtune prepare JOB -o "
                "BUNDLE` there and give the bundle"
            )
        raise (UserError if done.returncode == UserError.exit_code else EnvironmentProblem)(said)
    return open_bundle(folder / "bundle")


def _serve(
    home: Any,
    where: tuple[str, int],
    insecure: bool,
    stay: bool,
    scrape: tuple[str, int] | None,
    journal: Journal,
) -> None:
    from fedtune.workflows.serve import serve

    exporter = None
    if scrape is not None:
        from fedtune.server.metrics import Exporter

        exporter = Exporter(*scrape)
    seen: dict[str, Any] = {}

    def listen(facts: dict[str, Any]) -> None:
        if not seen:  # the first facts come when the port is open
            text = f"listening on {where[0]}:{where[1]}" + (" without TLS" if insecure else "")
            journal.event("listening", text, address=f"{where[0]}:{where[1]}", insecure=insecure)
        if exporter:
            exporter.update(facts)
        _tell(facts, seen, journal)

    def watch(entry: Any, run: RunFolder, bundle: Bundle) -> Watch:
        rounds = bundle.job.federation.rounds
        journal.event("run", f"run folder: {run.path}", run=str(run.path), bundle=bundle.digest)
        if bundle.job.privacy.hides_clients:
            journal.event("unscored", UNSCORED)

        def line(values: dict[str, Any]) -> None:
            journal.event("round", round_text(values, rounds), **values)
            for name, reason in values["refused"].items():
                journal.event(
                    "refused",
                    f"  {name}: {reason}",
                    "warning",
                    device=name,
                    reason=reason,
                    round=values["round"],
                )

        def reply(reply: Reply) -> None:
            if exporter:
                exporter.reply(reply)
            journal.advance(not reply.late)

        return Watch(journal.stage, journal.advance, reply, line)

    if not stay and not any(not e.finished for e in home.entries()):
        journal.event("idle", "nothing is queued; give a job, or --stay to wait for one")
        return
    for entry, summary in serve(home, where, insecure, stay, watch, listen):
        journal.event(
            "finished",
            f"finished {entry.name}: accuracy {_figure(summary['final']['accuracy'])}; "
            f"report: {entry.run / 'report.html'}",
            run=str(entry.run),
        )


def _tell(facts: dict[str, Any], seen: dict[str, Any], journal: Journal) -> None:
    """A line when a device's state changes, and when the service begins to wait."""
    for device in facts["devices"]:
        now = device["state"] if device["online"] else "offline"
        if seen.get(device["name"]) != now:
            seen[device["name"]] = now
            reason = f": {device['reason']}" if now == "refused" else ""
            count = f", {device['examples']:,} examples" if now == "ready" and device["examples"] else ""
            if now != "asked":
                journal.event(
                    "device",
                    f"device {device['name']} {now}{count}{reason}",
                    "warning" if now == "refused" else "info",
                    **device,
                )
    waits = (
        f"waiting for devices: {facts.get('ready', 0)} of {facts.get('need', '?')} ready"
        if facts["state"] == "waiting" and "need" in facts
        else None
    )
    if waits and seen.get("") != waits:
        journal.stage(waits)
    seen[""] = waits


def _figure(value: float | None) -> str:
    return "not measured" if value is None or value != value else f"{value:.4f}"
