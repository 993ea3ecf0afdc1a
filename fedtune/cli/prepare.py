"""fedtune prepare: makes a job's bundle."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.common import JobArgument, JsonOption, SetOption, UnderstandOption, out, overrides, shell
from fedtune.cli.progress import Board
from fedtune.job import load_job
from fedtune.report.format import size

EXAMPLES = "Examples:  fedtune prepare job.toml -o bundle   |   fedtune server bundle --dir coordinator"


@shell
def command(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.", show_default=False)],
    job: JobArgument = None, set_: SetOption = None, understand: UnderstandOption = False, as_json: JsonOption = False,
) -> None:
    """Makes the bundle that a coordinator serves and devices receive: the job, the frame and the start. Needs the base, no data."""
    checked = load_job(job, overrides(set_, understand))
    with Board(out) as board:
        from fedtune.workflows.prepare import prepare

        bundle = prepare(checked, folder, (lambda text: None) if as_json else board.stage)
    shipped = sum(map(len, bundle.shipped().values()))
    if as_json:
        print(json.dumps({"bundle": bundle.digest, "folder": str(folder), "shipped_bytes": shipped}))
    else:
        out.print(f"bundle {bundle.digest[:12]} in {folder}: {size(shipped)} to each device, once", markup=False, highlight=False, soft_wrap=True)
