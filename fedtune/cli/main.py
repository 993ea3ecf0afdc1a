"""The `fedtune` command."""

import typer

from fedtune.cli import compare, export, fetch, init, plan, predict, report, simulate, validate

app = typer.Typer(name="fedtune", help="Federated fine-tuning with adapters of kilobytes.", no_args_is_help=True, pretty_exceptions_enable=False)
for module in (init, validate, plan, fetch, simulate, report, compare, export, predict):
    app.command(name=module.__name__.rpartition(".")[2], epilog=module.EXAMPLES)(module.command)


def main() -> None:
    app()
