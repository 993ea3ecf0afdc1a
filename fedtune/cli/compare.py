"""fedtune compare: several runs beside each other."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.common import JsonOption, no_dash, out, shell
from fedtune.common.storage import write_atomic
from fedtune.errors import UserError
from fedtune.report.summary import Summary

EXAMPLES = (
    "Examples:  fedtune compare runs/fed-sb-001 runs/lora-001   |   fedtune compare runs/* --out compare.html"
)


@shell
def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, two or more.", show_default=False)],
    out_: Annotated[
        Path | None,
        typer.Option(
            "--out", callback=no_dash, help="Also write the comparison as a page.", show_default=False
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Prints final figures of several runs, what sets their jobs apart,
    and what makes them hard to compare.
    """
    from fedtune.report import compare
    from fedtune.report.summary import load_summary

    if len(runs) < 2:
        raise UserError(
            f"{len(runs)} run given: a comparison needs at least 2; add another run folder, "
            f"or use `fedtune report {runs[0]}`"
        )
    summaries = [_named(load_summary(run), run) for run in runs]
    if json_:
        out.print_json(
            json.dumps(
                [dict(zip(compare.header(summaries), row, strict=True)) for row in compare.rows(summaries)]
            )
        )
    else:
        compare.table(summaries, out)
    if out_:
        write_atomic(out_, compare.render(summaries).encode())
        if not json_:
            out.print(f"page: {out_.resolve()}", markup=False, highlight=False, soft_wrap=True)


def _named(summary: Summary, run: Path) -> Summary:
    """Under its job's own title, else its folder's name: generated titles tell runs apart badly."""
    if summary["job"].get("report", {}).get("title"):
        return summary
    folder = run if run.is_dir() else run.parent
    return {**summary, "title": folder.resolve().name}
