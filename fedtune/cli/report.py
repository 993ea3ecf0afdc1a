"""fedtune report: one run's figures, and its page again."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.common import JsonOption, out, shell
from fedtune.runs.folder import open_run
from fedtune.runs.ledger import require_whole

EXAMPLES = "Examples:  fedtune report runs/fed-sb-001   |   fedtune report runs/fed-sb-001 --json"


@shell
def command(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)], json_: JsonOption = False
) -> None:
    """Prints what a run gave and writes its page; an unfinished run is reported as far as it came."""
    from fedtune.report.summary import load_summary
    from fedtune.report.terminal import show
    from fedtune.workflows.summary import facts, write_page, write_summary

    folder = open_run(run)
    if (
        folder.summary.exists()
        and load_summary(folder.path)["rounds"][-1]["round"] == folder.metrics()[-1]["round"]
    ):
        # the page's claims are those of a ledger that was whole
        require_whole(folder.ledger, folder.metrics()[-1]["round"])
        write_page(folder, load_summary(folder.path))
    else:
        write_summary(folder, facts(folder))
    summary = load_summary(folder.path)
    if json_:
        out.print_json(json.dumps(summary))
        return
    show(summary, out)
    if folder.page.exists():
        out.print(f"page: {folder.page.resolve()}", markup=False, highlight=False, soft_wrap=True)
