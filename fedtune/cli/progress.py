"""Progress of long work: bars with rate and time left on a terminal, plain lines elsewhere."""

from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(TextColumn):
    """Steps a second, once a bar has moved."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2g}/s" if speed and task.total else "", style="dim")


class Board(AbstractContextManager["Board"]):
    """Shows stages, one after another.

    On a terminal the running one is a bar; elsewhere each stage is a line.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task: TaskID | None = None
        self._text = ""

    def __enter__(self) -> "Board":
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars:
            self._bars.stop()

    def stage(self, text: str, total: int = 0) -> None:
        """Ends the running stage and begins another, of `total` steps; 0 is unknown."""
        self._text = text
        if self._bars is None:
            self.line(text)
            return
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(text, total=total or None)

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` steps of the running stage are done; `note` stands beside its name."""
        if self._bars and self._task is not None:
            self._bars.update(self._task, advance=count, description=f"{self._text} {note}".rstrip())

    def line(self, text: Any) -> None:
        """A line that stays."""
        self.console.print(Text(str(text)), soft_wrap=True)
