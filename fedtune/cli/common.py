"""What every command shares: how errors end a process, and the options that stand in several commands."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from fedtune.errors import EnvironmentProblem, FedtuneError

INTERRUPTED = 130
JobArgument = Annotated[
    Path | None, typer.Argument(help="Job file (TOML). Without one, the default job.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Overrides a key of the job; repeatable."),
]
UnderstandOption = Annotated[
    bool,
    typer.Option(
        "--i-understand", help="Go on with an epsilon above 10; the same as --set privacy.i-understand=true."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def no_dash(path: Path | None) -> Path | None:
    """For what a command writes: refuses a name that begins with a dash, which is an option in the wrong
    place, or meant as standard output.
    """
    if path is not None and str(path).startswith("-"):
        raise typer.BadParameter(
            f"{path} begins with a dash, as options do; give another name, or its full path"
        )
    return path


def _width(stream: TextIO) -> int | None:
    """Lines fit a terminal; in a file or a pipe they stay whole, so that `grep` finds what it looks for."""
    return None if stream.isatty() or "COLUMNS" in os.environ else 1000


out = Console(emoji=False, width=_width(sys.stdout))
err = Console(stderr=True, emoji=False, width=_width(sys.stderr))


def busy(text: str) -> AbstractContextManager[Any]:
    """Shows that something is being worked out, on a terminal; elsewhere nothing."""
    return err.status(text) if err.is_terminal else nullcontext()


def overrides(set_: list[str] | None, understand: bool = False) -> list[str]:
    """The values of --set, with what --i-understand stands for."""
    return [*(set_ or ()), *(["privacy.i-understand=true"] if understand else [])]


def shell(command: Callable[..., Any]) -> Callable[..., Any]:
    """Ends the process as fedtune's errors say: one message on stderr, exit code 2, 3 or 4,
    and 130 when interrupted.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except FedtuneError as e:
            err.print(f"fedtune: {e}", style="red", markup=False, highlight=False, soft_wrap=True)
            sys.exit(e.exit_code)
        except ModuleNotFoundError as e:  # of an installation for another role; one of fedtune's own is a bug
            if (e.name or "fedtune").partition(".")[0] == "fedtune":
                raise
            err.print(
                f"fedtune: this needs the package {e.name}, which is not installed here; install "
                "fedtune[sim], on a coordinator fedtune[server], on a device with torch fedtune[client]",
                style="red",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            sys.exit(EnvironmentProblem.exit_code)
        except KeyboardInterrupt:
            err.print("fedtune: interrupted", markup=False)
            sys.exit(INTERRUPTED)

    # typer would show where the lines of the source break
    run.__doc__ = "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))
    return run
