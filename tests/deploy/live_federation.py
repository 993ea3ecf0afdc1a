"""Real processes on loopback: coordinators and devices started as people start them,
with keys made by `fedtune provision`.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedtune import provision

WAIT = 150.0  # seconds for anything to happen; these machines may be slow
DOMAINS = ("books", "films", "meals")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Process:
    """A fedtune command with its output in a file. `kill` takes its children along, as a power cut would."""

    def __init__(self, log: Path, *command: str, prefix: Sequence[str] = ()) -> None:
        self.log = log
        self._file = log.open("ab")
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "400"},
        )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, text: str, times: int = 1) -> None:
        """Until the output holds `text` so often.

        Fails with the output when the process ends first or time is up.
        """
        until(
            lambda: self.text.count(text) >= times or not self.running,
            f"{text!r} in {self.log.name}",
            lambda: self.text,
        )
        assert self.text.count(text) >= times, (
            f"ended with {self.process.returncode} before {text!r}:\n{self.text}"
        )

    def wait(self) -> int:
        until(lambda: not self.running, f"the end of {self.log.name}", lambda: self.text)
        return int(self.process.returncode)

    def kill(self) -> None:
        """SIGKILL to it and all below it."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for child in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self.process.wait()

    def close(self) -> None:
        self._file.close()

    def stop(self) -> int:
        """SIGTERM, as a service manager stops it."""
        if self.running:
            self.process.terminate()
        return self.wait()


def until(
    true: Callable[[], bool], what: str, say: Callable[[], str] = lambda: "", seconds: float = WAIT
) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"no {what} within {seconds:.0f} s\n{say()}"
        time.sleep(0.1)


class Federation:
    """One coordinator folder and device folders beside it, on a port of their own."""

    def __init__(
        self, root: Path, names: Sequence[str] = DOMAINS, hosts: Sequence[str] = ("127.0.0.1",)
    ) -> None:
        self.root, self.host, self.port = root, hosts[0], free_port()
        self.keys = root / "keys"
        provision.make(self.keys, list(hosts), list(names))
        self.home = self.keys / "server"
        self.processes: list[Process] = []

    def start(self, *command: str, name: str, prefix: Sequence[str] = ()) -> Process:
        process = Process(self.root / f"{name}.log", *command, prefix=prefix)
        self.processes.append(process)
        return process

    def server(
        self, *arguments: str | Path, name: str = "server", address: str = "", prefix: Sequence[str] = ()
    ) -> Process:
        return self.start(
            "fedtune.cli.main",
            "server",
            *map(str, arguments),
            "--dir",
            str(self.home),
            "--address",
            f"{address or self.host}:{self.port}",
            name=name,
            prefix=prefix,
        )

    def client(
        self, name: str, data: Path, *arguments: str | Path, address: str = "", prefix: Sequence[str] = ()
    ) -> Process:
        return self.start(
            "fedtune.cli.main",
            "client",
            "--server",
            f"{address or self.host}:{self.port}",
            "--dir",
            str(self.keys / "devices" / name),
            "--data",
            str(data),
            *map(str, arguments),
            name=name,
            prefix=prefix,
        )

    def run(self, number: int = 1) -> Path:
        (found,) = (self.home / "runs").glob(f"{number:03d}-*")
        return found

    def metrics(self, number: int = 1) -> list[dict]:
        """A line per finished round of a run; none before it begins."""
        found = list((self.home / "runs").glob(f"{number:03d}-*/metrics.jsonl"))
        return [json.loads(line) for line in found[0].read_text().splitlines()] if found else []

    def service(self) -> dict:
        """What the service says that it does."""
        return json.loads((self.home / "service.json").read_text())

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.close()
