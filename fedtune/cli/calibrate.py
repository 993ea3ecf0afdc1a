"""fedtune privacy calibrate: which noise for an epsilon, which epsilon for a noise."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from fedtune.cli.common import (
    JobArgument,
    JsonOption,
    SetOption,
    UnderstandOption,
    busy,
    out,
    overrides,
    shell,
)

if TYPE_CHECKING:
    from fedtune.workflows.calibrate import Calibration, Row

EXAMPLES = (
    "Examples:  fedtune privacy calibrate --set privacy.unit=example --set privacy.examples=200   |   "
    "fedtune privacy calibrate job.toml --epsilon 2 --epsilon 8   |   "
    "fedtune privacy calibrate --set privacy.unit=client --clients 5000 --noise 1.0 --json"
)


@shell
def command(
    job: JobArgument = None,
    set_: SetOption = None,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(
            "--epsilon",
            metavar="E",
            help="Which noise gives this; repeatable (default: 1, 3, 10 and the job's).",
            show_default=False,
        ),
    ] = None,
    noise: Annotated[
        list[float] | None,
        typer.Option(
            "--noise",
            metavar="Z",
            help="Which epsilon this noise multiplier gives; repeatable.",
            show_default=False,
        ),
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option("--clients", metavar="N", help="Same as --set data.clients=N.", show_default=False),
    ] = None,
    understand: UnderstandOption = False,
    json_: JsonOption = False,
) -> None:
    """Prints what a job's privacy will need before it runs: noise, epsilon, and how much of the signal stands
    out of the noise. Needs no data, no weights, and neither a clip nor an epsilon in the job.
    """
    from fedtune.workflows.calibrate import make_calibration, read_job

    checked = read_job(
        job, [*overrides(set_, understand), *([f"data.clients={clients}"] if clients is not None else [])]
    )
    with busy("computing noise and epsilon"):
        found = make_calibration(checked, epsilon or (), noise or ())
    if json_:
        out.print_json(json.dumps(found.to_json()))
        return
    _show(found, out)


def _show(found: "Calibration", console: Console) -> None:
    from fedtune.report.format import clean, count
    from fedtune.report.terminal import table

    one = found.rows[0]
    console.print(
        Text(f"Each {found.unit} protected, of {count(found.units)}; delta = {one.delta:.3g}", style="bold")
    )
    for amplification in dict.fromkeys(row.amplification for row in found.rows):
        rows = [row for row in found.rows if row.amplification == amplification]
        if found.unit == "client":
            console.print(
                Text(f"{'With' if amplification else 'Without'} amplification: {_counted(rows[0])}")
            )
        console.print(
            table(("asked", "noise", "PLD", "RDP", "rounds", "steps", "rate"), [_cells(row) for row in rows])
        )
        if found.parts:
            header = (
                "signal to noise, at most",
                "parts",
                "numbers",
                *(f"z = {row.noise_multiplier:g}" for row in rows),
            )
            console.print(
                table(
                    header,
                    [
                        (
                            clean(p.name),
                            count(p.count),
                            count(p.numbers),
                            *(f"{row.signal_to_noise[p.name]:.2g}" for row in rows),
                        )
                        for p in found.parts
                    ],
                )
            )
    console.print(
        Text(
            "noise: the multiplier z; PLD, RDP: epsilon by that accountant, of which the smaller counts; "
            "rounds: those a unit may be in; steps: uses of the noise in them; "
            "rate: the chance of a unit to be in one.",
            style="dim",
        )
    )
    if found.parts:
        console.print(Text(found.definition, style="dim"))
    for note in found.warnings + found.notes:
        console.print(Text(f"! {clean(note)}", style="yellow"))


def _counted(row: "Row") -> str:
    if row.sampling == "none":
        return "a client is charged for every round it is asked in"
    return f"nobody learns who was drawn ({row.sampling} sampling)"


def _cells(row: "Row") -> tuple[str, ...]:
    from fedtune.report.format import ABSENT, count
    from fedtune.report.privacy import shown

    by = [shown(row.readings[name]) if name in row.readings else ABSENT for name in ("pld", "rdp")]
    return (
        row.asked,
        f"{row.noise_multiplier:g}",
        *by,
        count(row.rounds),
        count(row.steps),
        f"{row.rate:.3g}",
    )
