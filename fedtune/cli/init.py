"""fedtune init: writes a commented job."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.common import SetOption, no_dash, out, shell
from fedtune.common.storage import write_atomic
from fedtune.errors import UserError
from fedtune.job import parse_job, to_toml

EXAMPLES = "Examples:  fedtune init job.toml   |   fedtune init job.toml --set adapter.rank=32"


@shell
def command(
    path: Annotated[Path, typer.Argument(help="File to write; - prints it.")] = Path("job.toml"),
    set_: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Writes a job file with every key, its default and a comment."""
    job = parse_job("", set_ or ())
    if str(path) == "-":
        sys.stdout.write(to_toml(job, comments=True))
        return
    no_dash(path)
    if path.exists() and not force:
        raise UserError(f"{path} exists; choose another name or give --force")
    write_atomic(path, to_toml(job, comments=True).encode())
    out.print(f"wrote {path}; next: fedtune validate {path}", markup=False, highlight=False)
