"""The run folder: everything a run leaves, and what resuming reads.

job.toml            the job as it ran, every key
run.json            when and with what it began: versions, hashes of the job and the base,
                    who holds how much of what
bundle/             manifest and frame (fedtune.bundles.bundle)
start.json          bytes spent on a frame that clients' gradients made, written before that frame
checkpoints/        round-00003.safetensors…; the newest is where --resume starts
metrics.jsonl       one line a round; tensorboard/ has the same figures
clients/            what simulated clients keep for themselves, of a job whose clients keep anything
                    (fedtune.stateful.store)
ledger.sqlite       what left the devices, before it left
adapter/ peft/ onnx/ summary.json report.html README.md     written when the run ends
privacy.html        written by `fedtune privacy report`
"""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from fedtune.common.storage import append, failing_clearly, lock, write_atomic, write_json
from fedtune.errors import RunError
from fedtune.job import Job, load_job, to_toml
from fedtune.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedtune.types import Arrays

KEEP_CHECKPOINTS = 2
PACKAGES = ("fedtune", "torch", "flwr", "transformers", "onnxruntime", "numpy", "safetensors", "pydantic")


class Facts(TypedDict):
    """run.json: what a run began with."""

    created: str
    versions: dict[str, str]
    sha256: str
    job_sha256: str
    split: list[dict[str, Any]]
    split_sha256: NotRequired[str]
    population: NotRequired[dict[str, Any]]
    own: NotRequired[dict[str, str]]


_FACTS = TypeAdapter(Facts)


@dataclass(frozen=True)
class RunFolder:
    """A run folder that exists. Methods read and write its parts; none keeps a file open."""

    path: Path

    @property
    def bundle(self) -> Path:
        return self.path / "bundle"

    @property
    def clients(self) -> Path:
        return self.path / "clients"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    def job(self) -> Job:
        return load_job(self.path / "job.toml")

    def facts(self) -> Facts:
        """run.json. Raises RunError when it is not whole."""
        path = self.path / "run.json"
        try:
            return _FACTS.validate_json(path.read_bytes())
        except (OSError, ValidationError) as e:
            raise RunError(
                f"{path}: damaged ({str(e).splitlines()[0]}); restore it or begin a new run"
            ) from None

    def require_own_job(self) -> None:
        """Raises RunError when job.toml is no longer the one the run began with:
        its result would mix two jobs.
        """
        if hashlib.sha256((self.path / "job.toml").read_bytes()).hexdigest() != self.facts()["job_sha256"]:
            raise RunError(
                f"{self.path / 'job.toml'}: was changed since the run began; "
                "restore it, or begin a new run with it"
            )

    def require_kept(self) -> None:
        """Raises RunError where what clients kept in the rounds that are done is gone:
        of a job whose clients keep anything.
        """
        if not self.clients.is_dir() and any(line["clients"] for line in self.metrics()):
            raise RunError(f"{self.clients}: what clients keep is missing; restore it or begin a new run")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for this process. Raises RunError when another process holds it."""
        with lock(self.path / ".lock") as mine:
            if not mine:
                raise RunError(f"{self.path}: another process is running it; wait for that one or stop it")
            yield

    def keep_start(self, counters: dict[str, Any]) -> None:
        """Before the bundle is written whose frame clients' gradients made: what they cost."""
        write_json(self.path / "start.json", counters)

    def start(self) -> dict[str, Any] | None:
        """What `keep_start` wrote, once the bundle is whole: then that frame stays,
        and nobody is asked again.
        """
        path = self.path / "start.json"
        if not (path.exists() and (self.bundle / "manifest.json").exists()):
            return None
        try:
            return dict(json.loads(path.read_bytes()))
        except ValueError as e:
            raise RunError(f"{path}: damaged ({e}); restore it or begin a new run") from None

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes the checkpoint of its round, then removes all but the first (round 0) and the newest few."""
        save_checkpoint(self._checkpoint(checkpoint.state.round), checkpoint)
        for old in self._checkpoints()[1:-KEEP_CHECKPOINTS]:
            old.unlink()

    def newest(self) -> Checkpoint | None:
        """The last finished round; None before the first checkpoint."""
        found = self._checkpoints()
        return load_checkpoint(found[-1]) if found else None

    def first_arrays(self) -> Arrays:
        """The model of round 0, where every comparison starts."""
        return load_checkpoint(self._checkpoint(0)).state.arrays

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Adds one round's line.

        A round that is written again (resumed) replaces its old line and all after it.

        The next round's line is appended, so that a round costs the same however many there were.
        """
        path, text = self.path / "metrics.jsonl", json.dumps(line, allow_nan=False) + "\n"
        if path.exists() and _last_round(path) == line["round"] - 1:
            append(path, text.encode())
            return
        lines = [x for x in self.metrics() if x["round"] < line["round"]]
        write_atomic(path, "".join([*(json.dumps(x, allow_nan=False) + "\n" for x in lines), text]).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """One line a round, from round 0 on without a gap. Raises RunError for anything else.

        A last line that was cut off while it was written is left out: its round has no checkpoint yet.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        try:
            *whole, _cut = path.read_text(encoding="utf-8").split("\n")
            lines = [json.loads(x) for x in whole]
            rounds = [line["round"] for line in lines]
        except (ValueError, KeyError, TypeError) as e:
            raise RunError(f"{path}: damaged ({e}); restore it or begin a new run") from None
        if rounds != list(range(len(lines))):
            raise RunError(f"{path}: rounds are missing or out of order; restore it or begin a new run")
        return lines

    def require_metrics(self, checkpoint: Checkpoint) -> None:
        """Raises RunError unless there is a line for each finished round of the checkpoint."""
        lines, round = len(self.metrics()), checkpoint.state.round
        if lines < round + (checkpoint.unfinished is None):
            raise RunError(
                f"{self.path / 'metrics.jsonl'}: {lines} rounds, the checkpoint stands after "
                f"round {round}; restore it"
            )

    def _checkpoint(self, round: int) -> Path:
        return self.path / "checkpoints" / f"round-{round:05d}.safetensors"

    def _checkpoints(self) -> list[Path]:
        found = (self.path / "checkpoints").glob("round-*.safetensors")
        return sorted(found, key=lambda p: (len(p.name), p.name))  # by number: round 100000 comes after 99999


def _last_round(path: Path) -> int | None:
    """The round of the last line of metrics.jsonl; None unless that line is whole."""
    with path.open("rb") as file:
        size, step = file.seek(0, 2), 2**13
        while True:
            file.seek(max(0, size - step))
            parts = file.read().split(b"\n")
            if len(parts) > 2 or step >= size:  # the last line is here from its beginning
                break
            step *= 2
    try:
        return None if parts[-1] else int(json.loads(parts[-2])["round"])
    except (ValueError, LookupError, TypeError):
        return None


def create_run(path: Path, job: Job, facts: dict[str, Any]) -> RunFolder:
    """Makes a new run folder.

    Raises RunError when `path` already holds something: nothing is ever overwritten.
    """
    with failing_clearly(path):
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file; choose another --out")
        if path.exists() and any(path.iterdir()):
            raise RunError(
                f"{path} already exists and is not empty; choose another --out, "
                f"or continue it with --resume {path}"
            )
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    text = to_toml(job).encode()
    write_atomic(path / "job.toml", text)
    write_json(path / "run.json", facts | {"job_sha256": hashlib.sha256(text).hexdigest()})
    return RunFolder(path)


def open_run(path: Path) -> RunFolder:
    """Raises RunError when `path` is not a run folder."""
    if not (path / "run.json").is_file() or not (path / "job.toml").is_file():
        raise RunError(
            f"{path}: not a run folder (no run.json and job.toml in it); "
            "give the folder that `fedtune simulate` printed"
        )
    return RunFolder(path)


def next_run_path(root: Path, stem: str) -> Path:
    """The first of root/stem-001, root/stem-002… that does not exist."""
    return next(p for p in _numbered(root, stem) if not p.exists())


def _numbered(root: Path, stem: str) -> Iterator[Path]:
    number = 0
    while True:
        number += 1
        yield root / f"{stem}-{number:03d}"


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
