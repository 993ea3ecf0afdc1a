"""fedtune export: writes the adapter, the PEFT folder and the ONNX graphs of a run again."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedtune.cli.common import JsonOption, SetOption, err, no_dash, out, shell
from fedtune.cli.progress import Board
from fedtune.errors import RunError, UserError
from fedtune.job import load_job
from fedtune.runs.folder import RunFolder, open_run

EXAMPLES = (
    "Examples:  fedtune export runs/fed-sb-001   |   "
    "fedtune export runs/fed-sb-001 --set export.opset=18 --examples 2000   |   "
    "fedtune export runs/ditto-001 --client client-07 --out client-07"
)


@shell
def command(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    set_: SetOption = None,
    examples: Annotated[
        int | None,
        typer.Option(
            "--examples",
            min=1,
            help="Held-out examples graphs are compared on (default: 512).",
            show_default=False,
        ),
    ] = None,
    client: Annotated[
        str | None,
        typer.Option(
            "--client",
            metavar="NAME",
            help=(
                "What this simulated client predicts with, of a run with [personal], "
                "in place of the global model; with --out."
            ),
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out", callback=no_dash, help="With --client: a new folder for it.", show_default=False
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Exports a run at its newest checkpoint, in place of what it exported before."""
    if (client is None) != (target is None):
        raise UserError(
            "--client and --out go together: a client's own model is written to a folder of its "
            "own, the run's into the run"
        )
    folder = open_run(run)
    for item in set_ or ():
        if not item.strip().startswith("export."):
            raise UserError(
                f"--set {item}: the run is done, only keys of [export] can change; "
                "give one, such as export.onnx=false"
            )
    job = load_job(folder.path / "job.toml", set_ or ())
    with Board(Console(quiet=True) if json_ else out) as board:
        board.stage("opening the base and the data")
        from fedtune.workflows.export import EXAMPLES as USUAL
        from fedtune.workflows.export import export_client, export_run
        from fedtune.workflows.setup import open_setup

        if client is not None and target is not None:
            exports = export_client(folder, client, target, open_setup(job), board.stage, examples or USUAL)
        else:
            exports = export_run(folder, open_setup(job), board.stage, examples or USUAL)
            _update_summary(folder, exports)
    if json_:
        out.print_json(json.dumps(exports))
        return
    for line in (
        *_lines(target or folder.path, exports),
        *(() if target else (f"model card: {folder.path / 'README.md'}",)),
    ):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _lines(run: Path, exports: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each export: its file and size, and for a graph how it compares with the trained model."""
    from fedtune.report.format import number, size, small
    from fedtune.report.tables import EXPORTS

    lines = []
    for kind, e in exports.items():
        name = EXPORTS.get(kind, kind)
        if "note" in e:
            lines.append(f"{name}: left out, {e['note']}")
            continue
        line = f"{name}: {run / e['file']}, {size(e['bytes'])}"
        if "examples" in e:
            agreement, accuracy = number(e["label_agreement"]), number(e["accuracy"])
            line += (
                f", largest difference {small(e['max_difference'])}, label agreement "
                f"{agreement}, accuracy {accuracy}"
            )
            line += f" on {e['examples']:,} of {e['of']:,} held-out examples"
        lines.append(line)
    return lines


def _update_summary(folder: RunFolder, exports: dict[str, dict[str, Any]]) -> None:
    """Puts the figures into summary.json and the page; a run that was not finished has neither."""
    from fedtune.workflows.summary import write_summary

    if not folder.summary.exists():
        err.print(
            f"{folder.path}: has no summary.json yet, so the figures are in README.md and onnx/ only",
            markup=False,
            soft_wrap=True,
        )
        return
    try:
        summary = json.loads(folder.summary.read_bytes())
    except ValueError as e:
        raise RunError(
            f"{folder.summary}: not JSON ({e}); the exports are written, the summary is not"
        ) from None
    write_summary(folder, summary | {"export": exports})
