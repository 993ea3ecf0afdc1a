"""What long-running commands say: lines and bars for people, or one JSON object a line for programs."""

import json
import logging
import sys
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

from fedtune.cli.common import out
from fedtune.cli.progress import Board


class Journal(AbstractContextManager["Journal"]):
    """`event` writes one line; `stage` and `advance` move the bar, where there is one."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._board = None if as_json else Board(out)
        self._before: list[logging.Handler] = []

    def __enter__(self) -> "Journal":
        root, handler = logging.getLogger(), _Handler(self)
        handler.setLevel(logging.WARNING)
        self._before, root.handlers[:] = root.handlers[:], [handler]
        if self._board:
            self._board.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger().handlers[:] = self._before
        if self._board:
            self._board.__exit__(*error)

    def event(self, name: str, text: str, level: str = "info", /, **facts: Any) -> None:
        """`text` is for people; programs get `name`, `text` and the facts."""
        if self._board:
            self._board.line(text if level == "info" else f"{level}: {text}")
        else:
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "level": level,
                "event": name,
                "text": text,
                **facts,
            }
            sys.stdout.write(json.dumps(line, allow_nan=False, default=str) + "\n")
            sys.stdout.flush()

    def stage(self, text: str, total: int = 0) -> None:
        if self._board:
            self._board.stage(text, total)
        else:
            self.event("stage", text, total=total)

    def advance(self, count: int = 1, note: str = "") -> None:
        if self._board:
            self._board.advance(count, note)


class _Handler(logging.Handler):
    """Warnings of libraries, on the same way; one line each, as a traceback in a log helps
    nobody who runs a device.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if record.exc_info and record.exc_info[1] is not None:
            text += f" ({type(record.exc_info[1]).__name__})"
        self._journal.event("log", f"{record.name}: {text}", record.levelname.lower(), logger=record.name)
