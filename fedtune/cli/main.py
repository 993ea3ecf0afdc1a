"""The `fedtune` command."""

import typer

from fedtune.cli import fetch, init, simulate, validate

app = typer.Typer(name="fedtune", help="Federated fine-tuning with adapters of kilobytes.", no_args_is_help=True, pretty_exceptions_enable=False)
for module in (init, validate, fetch, simulate):
    app.command(name=module.__name__.rpartition(".")[2], epilog=module.EXAMPLES)(module.command)


def main() -> None:
    app()
