"""fedtune prepare: makes a job's bundle."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.common import (
    JobArgument,
    JsonOption,
    SetOption,
    UnderstandOption,
    no_dash,
    out,
    overrides,
    shell,
)
from fedtune.cli.progress import Board
from fedtune.errors import UserError
from fedtune.job import load_job
from fedtune.report.format import size

EXAMPLES = (
    "Examples:  fedtune prepare job.toml -o bundle   |   "
    "fedtune prepare job.toml -o bundle --edge edge-folder --int8   |   "
    "fedtune server bundle --dir coordinator"
)


@shell
def command(
    folder: Annotated[
        Path, typer.Option("--out", "-o", callback=no_dash, help="Folder to make.", show_default=False)
    ],
    edge: Annotated[
        Path | None,
        typer.Option(
            "--edge",
            help="Also make this folder, with which a device trains without torch (fedtune edge).",
            show_default=False,
        ),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help=(
                "With --edge: frozen weights of 8 bits, a quarter of the size; "
                "devices then train on a base rounded so."
            ),
        ),
    ] = False,
    job: JobArgument = None,
    set_: SetOption = None,
    understand: UnderstandOption = False,
    as_json: JsonOption = False,
) -> None:
    """Makes the bundle that a coordinator serves and devices receive: the job, the frame and the start.
    Needs the base, no data.
    """
    if int8 and edge is None:
        raise UserError("--int8: only for the folder of --edge; give --edge FOLDER, or leave it away")
    checked = load_job(job, overrides(set_, understand))
    with Board(out) as board:
        from fedtune.workflows.prepare import prepare

        bundle = prepare(checked, folder, edge, (lambda text: None) if as_json else board.stage, int8)
    shipped = sum(map(len, bundle.shipped().values()))
    taken = 0 if edge is None else sum(p.stat().st_size for p in edge.iterdir())
    if as_json:
        print(
            json.dumps(
                {"bundle": bundle.digest, "folder": str(folder), "shipped_bytes": shipped}
                | ({"edge": str(edge), "edge_bytes": taken} if edge else {})
            )
        )
    else:
        out.print(
            f"bundle {bundle.digest[:12]} in {folder}: {size(shipped)} to each device, once",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if edge is not None:
            out.print(
                f"training graphs in {edge}: {size(taken)}, to be copied to devices without torch",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
