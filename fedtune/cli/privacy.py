"""fedtune privacy: what a run spent, and what a job will."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli import audit, calibrate
from fedtune.cli.common import JsonOption, busy, out, shell
from fedtune.runs.folder import open_run

EXAMPLES = (
    "Examples:  fedtune privacy report runs/fed-sb-001   |   fedtune privacy report runs/fed-sb-001 --json"
)

app = typer.Typer(
    name="privacy",
    help=(
        "Differential privacy: what a run spent, which noise a job needs, and whether it does what it claims."
    ),
    no_args_is_help=True,
    suggest_commands=False,
    pretty_exceptions_enable=False,
)


@app.command(epilog=EXAMPLES)
@shell
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, finished or not.", show_default=False)],
    json_: JsonOption = False,
) -> None:
    """Reads a run's ledger: epsilon by every accountant, by round and by client, what each kind of release
    cost, what is left, and what has to be true for it. Writes privacy.html into the run folder.
    """
    from fedtune.report.terminal import show_privacy
    from fedtune.workflows.privacy import privacy_of, title_of, write_privacy_page

    folder = open_run(run)
    with busy("reading the ledger"):
        found = privacy_of(folder)
    if json_:
        out.print_json(json.dumps(found))
        return
    show_privacy(found, title_of(folder), out)
    out.print(
        f"page: {write_privacy_page(folder, found).resolve()}", markup=False, highlight=False, soft_wrap=True
    )


for module in (audit, calibrate):
    app.command(name=module.__name__.rpartition(".")[2], epilog=module.EXAMPLES)(module.command)
