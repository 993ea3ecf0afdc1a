"""The light end of the trainer: starts the trainer process, watches it, and passes packets to it.

Imports no torch.

The process is started by the first call, and again by a call that finds it gone: idle, killed, or out of
memory. Its socket and settings lie in a private folder made for each start and removed when it ends; see
`fedtune.process.trainer`.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedtune.common.storage import failing_clearly
from fedtune.errors import (
    DataError,
    EnvironmentProblem,
    FedtuneError,
    JobError,
    ModelError,
    Refused,
    RunError,
    UserError,
)
from fedtune.process.trainer import CLIENT, ERROR, MAX_MESSAGE, SERVICE
from fedtune.process.waits import TRAINER_DEATH as DEATH_SECONDS
from fedtune.process.waits import TRAINER_HEALTH as HEALTH_SECONDS
from fedtune.process.waits import TRAINER_POLL as POLL_SECONDS
from fedtune.process.waits import TRAINER_START as START_SECONDS
from fedtune.process.waits import TRAINER_STOP as STOP_SECONDS

MAX_SOCKET = 107  # bytes of a socket's path, of the 108 with its closing zero
MAX_LOG = 2**20  # bytes from which a log is begun anew at a start
OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_metadata_size", 2**16),  # a status carries an error's message
    ("grpc.enable_http_proxy", 0),
)
_PREFIX = "fedtune-trainer-"
_PLAIN = re.compile(r"[\w/.+-]*", re.ASCII)  # what a path in a gRPC address may hold without being quoted
_SOCKET, _CONFIG = "s", "config.json"
_WITH_TORCH, _WITHOUT = "fedtune.training.service", "fedtune.edge.service"


@dataclass(frozen=True)
class TrainerSettings:
    """What a trainer works with and where it lives.

    Attributes:
        bundle: folder of the bundle.
        data: file of texts or folder of images.
        base: folder of the base; None for the one that the bundle names.
        threads: to compute with; 0 for all cores.
        idle_seconds: time without a call after which the process ends and gives its memory back; 0 for never.
        log: file that the process's output is appended to.
        folder: where the private folders go; where its path is too long for a socket,
            the system's temporary folder is used.
        graphs: folder of training graphs: the trainer is then the one without torch, which keeps to
            `memory_mb` MB (10^6 bytes; 0: no limit).
        kept: where the device keeps its own of the job; None: nowhere.
    """

    bundle: Path
    data: Path
    base: Path | None
    threads: int
    idle_seconds: float
    log: Path
    folder: Path
    graphs: Path | None = None
    memory_mb: int = 0
    kept: Path | None = None


class Trainer:
    """Calls that one trainer process answers. Calls from several threads wait for each other.

    A call's timeout is for the work alone. A start before it has START_SECONDS; a process that ends during
    the call is started once more and the call made again, with the whole timeout. Every call raises

        the errors of the trainer itself: DataError, ModelError, RunError, JobError, UserError,
        Refused, EnvironmentProblem;
        EnvironmentProblem: it cannot be started, does not answer in time (it is killed then),
            ended twice, or failed by a bug.
    """

    def __init__(self, settings: TrainerSettings) -> None:
        self.settings = settings
        self.starts = 0
        """How often a process was started."""
        self._process: _Process | None = None
        self._calls = threading.Lock()  # held for a whole call
        self._state = threading.Lock()  # held for a moment, so that stop need not wait for a call
        self._stopped = False
        # The system kills a trainer when the thread that started it ends,
        # and callers' threads come and go: this one stays.
        self._starter = ThreadPoolExecutor(1, "trainer-starter")

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.alive

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        process = self._process
        return process.popen.pid if process is not None and process.alive else None

    @property
    def address(self) -> str:
        """gRPC address of the process while it runs, "" otherwise."""
        process = self._process
        return process.address if process is not None and process.alive else ""

    def open(self, timeout: float) -> dict[str, Any]:
        """Opens data and base, where that is not done yet, and returns {"examples": n, "held_out":
        m, "labels": {name: n}}.
        """
        return json.loads(self._call("Open", b"", timeout))

    def handle(self, packet: bytes, client: str, timeout: float) -> bytes:
        """The answer to a "model" or "gradient-request" packet."""
        return self._call("Handle", packet, timeout, ((CLIENT, client.encode()),))

    def evaluate(self, packet: bytes, timeout: float) -> bytes:
        """The "scores" of a "model" packet."""
        return self._call("Evaluate", packet, timeout)

    def stop(self) -> None:
        """Ends the process and removes its folder.

        A call under way and all later ones raise EnvironmentProblem.
        """
        with self._state:
            self._stopped = True
            process = self._process
        if process is not None:
            process.end()
        self._starter.shutdown(wait=False)

    def _call(
        self, method: str, body: bytes, timeout: float, metadata: Sequence[tuple[str, bytes]] = ()
    ) -> bytes:
        with self._calls:
            for last in (False, True):
                process = self._ready()
                try:
                    return process.request(method, body, timeout, metadata)
                except _Ended as e:
                    process.end()
                    self._require_open()
                    if last:
                        raise EnvironmentProblem(
                            f"trainer ended twice during {method} ({e}); {process.last_words()}"
                        ) from None
        raise AssertionError("unreachable")

    def _ready(self) -> "_Process":
        """A process that answered a health check just now.

        One that is there and does not is killed and replaced.
        """
        if self._process is not None and self._process.healthy(HEALTH_SECONDS):
            return self._process
        if self._process is not None:
            self._process.end(at_once=True)
        process = self._start()
        try:
            process.wait_until_healthy(START_SECONDS)
        except BaseException:
            process.end(at_once=True)
            self._require_open()
            raise
        return process

    def _start(self) -> "_Process":
        with self._state:
            self._require_open()
            self._process = self._starter.submit(_Process, self.settings).result()
            self.starts += 1
            return self._process

    def _require_open(self) -> None:
        if self._stopped:
            raise EnvironmentProblem("trainer was stopped; make another one")


class _Ended(Exception):
    """The process ended, or the connection to it, while it worked. The text says how."""


class _Process:
    """One started process with its folder, log and channel."""

    def __init__(self, settings: TrainerSettings) -> None:
        """Starts it; raises EnvironmentProblem or UserError where folder or log cannot be written."""
        self.log = settings.log
        with failing_clearly(settings.log):
            output = _open_log(settings.log)
        with open(output, "ab") as log:
            self._begin = log.tell()
            with failing_clearly(settings.folder):
                self.folder = _private_folder(settings.folder)
            try:
                self._lease = _write_config(self.folder, settings)
                self.address = f"unix:{self.folder / _SOCKET}"
                # -P: a file called random.py in the folder one stands in is not what `import random` means
                command = [
                    sys.executable,
                    "-P",
                    "-m",
                    _WITH_TORCH if settings.graphs is None else _WITHOUT,
                    str(self.folder / _CONFIG),
                ]
                self.popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            except BaseException:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
        self._channel: grpc.Channel | None = None

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def wait_until_healthy(self, seconds: float) -> None:
        """Raises EnvironmentProblem when it ends before, or is not healthy in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.alive:
                raise EnvironmentProblem(f"trainer did not start ({self._how()}); {self.last_words()}")
            # the socket first: a channel that finds none waits ever longer between attempts
            if (self.folder / _SOCKET).exists() and self.healthy(
                min(HEALTH_SECONDS, deadline - time.monotonic())
            ):
                return
            time.sleep(POLL_SECONDS)
        raise EnvironmentProblem(f"trainer did not start within {seconds:g} s; {self.last_words()}")

    def healthy(self, seconds: float) -> bool:
        """Whether the process answers a health check, which it also does while it works."""
        if not self.alive:
            return False
        request = health_pb2.HealthCheckRequest(service="")
        try:
            answer = health_pb2_grpc.HealthStub(self._connection()).Check(request, timeout=seconds)
        except (grpc.RpcError, ValueError):  # ValueError: stop closed the channel
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def request(
        self, method: str, body: bytes, timeout: float, metadata: Sequence[tuple[str, bytes]]
    ) -> bytes:
        """One call.

        Raises _Ended when the process ends during it; past its timeout the process is killed,
        as it may hang for ever.
        """
        try:
            return self._connection().unary_unary(f"/{SERVICE}/{method}")(
                body, timeout=timeout, metadata=metadata
            )
        except ValueError:
            raise _Ended("stopped") from None  # stop closed the channel
        except grpc.RpcError as e:
            name = dict(e.trailing_metadata() or ()).get(ERROR)
            if name is not None:
                raise self._error(name, e.details() or "") from None
            if e.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                self.end(at_once=True)
                raise EnvironmentProblem(
                    f"trainer did not answer {method} within {timeout:g} s, it was stopped; "
                    f"allow more time, or give this device less work; {self.last_words()}"
                ) from None
            if e.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise EnvironmentProblem(
                    f"trainer: {e.details()}; a message may have at most {MAX_MESSAGE} bytes"
                ) from None
            raise _Ended(self._lost(e)) from None

    def end(self, at_once: bool = False) -> None:
        """Ends the process, waits for it and removes its folder; nothing the second time."""
        self.popen.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)
        try:
            self.popen.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        if self._channel is not None:
            self._channel.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lease.close()

    def last_words(self) -> str:
        """Where the log is and the last line that this process wrote to it."""
        with contextlib.suppress(OSError), self.log.open("rb") as f:
            f.seek(max(self._begin, self.log.stat().st_size - MAX_LOG))
            lines = [line for line in f.read().decode(errors="replace").splitlines() if line.strip()]
            if lines:
                return f"last line of {self.log}: {' '.join(lines[-1].split())[:300]}"
        return f"it wrote nothing to {self.log}"

    def _connection(self) -> grpc.Channel:
        if self._channel is None:
            self._channel = grpc.insecure_channel(self.address, options=OPTIONS)
        return self._channel

    def _lost(self, error: grpc.RpcError) -> str:
        try:
            self.popen.wait(DEATH_SECONDS)
        except subprocess.TimeoutExpired:
            return f"connection lost: {error.code().name}"
        return self._how()

    def _how(self) -> str:
        code = self.popen.poll()
        if code is None or code >= 0:
            return f"exit code {code}"
        return signal.Signals(-code).name + (", as when memory runs out" if -code == signal.SIGKILL else "")

    def _error(self, name: str, message: str) -> FedtuneError:
        """The error that a status names, from a closed table; any other name, as that of a bug,
        is an EnvironmentProblem.
        """
        if name == Refused.__name__:
            reason, _, rest = message.partition(": ")
            return Refused(reason, rest)
        if name == JobError.__name__:
            head, *problems = message.split("\n")
            return JobError([problem.strip() for problem in problems], head.rpartition(": ")[0])
        if name in _PLAIN_ERRORS:
            return _PLAIN_ERRORS[name](message)
        return EnvironmentProblem(f"trainer failed: {message}; this is a bug, its traceback is in {self.log}")


_PLAIN_ERRORS = {
    kind.__name__: kind for kind in (DataError, ModelError, RunError, UserError, EnvironmentProblem)
}


def _open_log(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    return os.open(
        path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | (os.O_TRUNC if size > MAX_LOG else 0), 0o600
    )


def _private_folder(place: Path) -> Path:
    """A new folder that only this user may enter, in `place` or, where a socket's address could not name
    that, in the temporary folder.
    """
    place = place.expanduser().absolute()
    fits = len(os.fsencode(place / f"{_PREFIX}12345678" / _SOCKET)) <= MAX_SOCKET and _PLAIN.fullmatch(
        str(place)
    )
    if fits:
        place.mkdir(parents=True, exist_ok=True)
    else:
        place = Path(tempfile.gettempdir())
    _sweep(place)
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))


def _write_config(folder: Path, settings: TrainerSettings) -> Any:
    """Writes the settings for the process and returns the open file,
    which stays locked as long as this process lives.
    """
    config = {
        "socket": str(folder / _SOCKET),
        "bundle": _absolute(settings.bundle),
        "data": _absolute(settings.data),
        "base": _absolute(settings.base) if settings.base is not None else "",
        "graphs": _absolute(settings.graphs) if settings.graphs is not None else "",
        "memory_mb": settings.memory_mb,
        "threads": settings.threads,
        "idle_seconds": settings.idle_seconds,
        "parent": os.getpid(),
        "kept": _absolute(settings.kept) if settings.kept is not None else "",
    }
    file = os.fdopen(
        os.open(folder / _CONFIG, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    )
    # a file system without locks: then _sweep gets none either and removes nothing
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    json.dump(config, file)
    file.flush()
    return file


def _sweep(place: Path) -> None:
    """Removes this user's folders of trainers whose parent was killed:
    nobody locks their settings any more.
    """
    for config in place.glob(f"{_PREFIX}*/{_CONFIG}"):
        with contextlib.suppress(OSError), config.open() as file:
            old = time.time() - config.stat().st_mtime > START_SECONDS  # not one that is being written
            if old and config.parent.lstat().st_uid == os.getuid():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(config.parent, ignore_errors=True)


def _absolute(path: Path) -> str:
    return str(path.expanduser().absolute())
