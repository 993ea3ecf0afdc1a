"""pfl in two processes of one thread, which is how it uses several cores: each trains half of the cohort,
then all statistics are added.
"""

import json
import os
import socket
import subprocess
import sys
from typing import Any

from contenders.serve import Commands
from contenders.work import Order

NAME = "pfl 2 processes"
ADDRESSES, RANK = "PFL_WORKER_ADDRESSES", "PFL_WORKER_RANK"  # pfl reads both at import


class Both(Commands):
    """The driver's commands go on to the second process; its answer is waited for and merged."""

    def __init__(self, second: subprocess.Popen) -> None:
        super().__init__()
        self.second = second

    def next(self) -> dict[str, Any] | None:
        command = super().next()
        if command is None:
            self.second.stdin.close()
            self.second.wait()
        else:
            print(json.dumps(command), file=self.second.stdin, flush=True)
        return command

    def answer(self, **values: Any) -> None:
        other = json.loads(self.second.stdout.readline())
        if "loss" in values:  # over equal halves of a cohort
            values["loss"] = (values["loss"] + other["loss"]) / 2
        super().answer(**values)


def run(order: Order) -> None:
    order = order._replace(threads=1)
    commands = Commands() if RANK in os.environ else Both(second(order))
    os.environ.setdefault(RANK, "0")
    from contenders import pfl_engine

    pfl_engine.run(order, commands)


def second(order: Order) -> subprocess.Popen:
    """Starts the other process. pfl wants an address for each and uses the first."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ[ADDRESSES] = f"127.0.0.1:{port},127.0.0.1:0"
    return subprocess.Popen(
        [sys.executable, sys.argv[0], "--serve", NAME, json.dumps(order)],
        env=os.environ | {RANK: "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
