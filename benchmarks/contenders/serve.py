"""A contender's side of the pipe to the driver: commands in, answers out, one line of JSON each."""

import json
import os
import sys
import time
from typing import Any


class Commands:
    """Reads {"rounds": N} and answers {"seconds": …}.

    Everything else that the process prints goes to its log.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def next(self) -> dict[str, Any] | None:
        """The next command, waiting for it without using the processor; None when there will be none."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def answer(self, **values: Any) -> None:
        print(json.dumps(values), file=self._out, flush=True)

    def ready(self) -> None:
        self.answer(ready=True)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._began
