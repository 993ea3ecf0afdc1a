"""The `fedtune` command."""

import os

import typer

from fedtune.cli import compare, export, fetch, init, plan, predict, report, simulate, validate

app = typer.Typer(name="fedtune", help="Federated fine-tuning with adapters of kilobytes.", no_args_is_help=True, pretty_exceptions_enable=False)
for module in (init, validate, plan, fetch, simulate, report, compare, export, predict):
    app.command(name=module.__name__.rpartition(".")[2], epilog=module.EXAMPLES)(module.command)


def main() -> None:
    # OpenMP threads that spin while they wait make a busy machine several times slower; read when torch is first imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
