"""fedtune status: what a coordinator service is doing."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fedtune.cli.common import JsonOption, out, shell

EXAMPLES = "Examples:  fedtune status --dir keys/server   |   watch fedtune status --dir keys/server"


@shell
def command(
    folder: Annotated[Path, typer.Option("--dir", help="The coordinator's folder.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Rounds, devices seen and refused, bytes, privacy spent so far, and time left.
    Reads the folder; asks nobody.
    """
    from fedtune.workflows.status import lines, read

    status = read(folder)
    if as_json:
        print(json.dumps(status, allow_nan=False, indent=2))
        return
    for text in lines(status):
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    if status["devices"]:
        classes = any(d.get("class") for d in status["devices"])
        table = Table(
            "device", *(["class"] if classes else []), "state", "examples", "rounds", "refused", "why"
        )
        for d in status["devices"]:
            class_ = [escape(d.get("class", ""))] if classes else []
            table.add_row(
                d["name"],
                *class_,
                d["state"] if d["online"] else "offline",
                f"{d['examples']:,}",
                str(d["rounds"]),
                str(d["refusals"]),
                escape(d["reason"]),
            )
        out.print(table)
