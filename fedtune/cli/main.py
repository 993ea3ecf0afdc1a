"""The `fedtune` command."""

import os
import sys
from typing import Annotated

import click
import typer

from fedtune import __version__
from fedtune.cli import (
    client,
    compare,
    edge,
    export,
    fetch,
    init,
    plan,
    predict,
    prepare,
    privacy,
    provision,
    report,
    server,
    simulate,
    status,
    validate,
)
from fedtune.cli.common import INTERRUPTED, err

app = typer.Typer(
    name="fedtune",
    help="Federated fine-tuning with adapters of kilobytes.",
    no_args_is_help=True,
    suggest_commands=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedtune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """What `fedtune` takes before a command."""


for module in (
    init,
    validate,
    plan,
    fetch,
    prepare,
    simulate,
    server,
    client,
    status,
    report,
    compare,
    export,
    predict,
):
    app.command(name=module.__name__.rpartition(".")[2], epilog=module.EXAMPLES)(module.command)
app.add_typer(edge.app)
app.add_typer(provision.app)
app.add_typer(privacy.app)


def main() -> None:
    # OpenMP threads that spin while they wait make a busy machine several times slower;
    # read when torch is first imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        sys.exit(app(prog_name="fedtune", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        sys.exit(e.exit_code)
    except click.UsageError as e:  # a mistyped option or command, on one line like every other mistake
        place = e.ctx.command_path if e.ctx else "fedtune"
        err.print(
            f"fedtune: {e.format_message().rstrip('.')}; see `{place} --help`",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(e.exit_code)
    except click.Abort:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
