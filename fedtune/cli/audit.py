"""fedtune privacy audit: a lower bound of epsilon, measured on the real pipeline."""

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from fedtune.cli.common import JobArgument, JsonOption, SetOption, err, out, shell
from fedtune.cli.progress import Board
from fedtune.errors import UserError
from fedtune.job import load_job

if TYPE_CHECKING:
    from fedtune.workflows.audit import AuditReport

EXAMPLES = (
    "Examples:  fedtune privacy audit job.toml   |   "
    "fedtune privacy audit job.toml --canaries 20000 --seed 1   |   "
    "fedtune privacy audit job.toml --set simulation.engine=serial --json"
)


class Kind(StrEnum):
    gradient = "gradient"
    input = "input"


@shell
def command(
    job: JobArgument = None,
    set_: SetOption = None,
    canaries: Annotated[
        int,
        typer.Option(
            "--canaries",
            metavar="M",
            help="Canaries, each in or out by the toss of a coin (0: up to 10,000, as many as are useful).",
        ),
    ] = 0,
    guesses: Annotated[
        int,
        typer.Option(
            "--guesses",
            metavar="R",
            help="Guesses to make of them (0: planned from M and the claimed epsilon).",
        ),
    ] = 0,
    delta: Annotated[
        float,
        typer.Option(
            "--delta",
            help="Where the bound and the job's claim are read; a smaller one can show more (0: the job's).",
        ),
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of the coins (default: a new one every time).", show_default=False),
    ] = None,
    kind: Annotated[
        Kind,
        typer.Option(
            "--kind",
            help=(
                "gradient: inside the mechanism, strong; input: mislabelled examples seen from outside, weak."
            ),
        ),
    ] = Kind.gradient,
    json_: JsonOption = False,
) -> None:
    """Runs the job with canaries and says what they prove: epsilon is at least this. Exit code 4 where that
    is more than the job claims.
    """
    for name, value in (("canaries", canaries), ("guesses", guesses), ("seed", seed or 0)):
        if value < 0:
            raise UserError(f"--{name} {value}: must be at least 0")
    if not 0 <= delta < 1:
        raise UserError(f"--delta {delta:g}: must be above 0 and below 1, or 0 for the job's")
    checked = load_job(job, set_ or ())
    with Board(err if json_ else out) as board:
        from fedtune.round.watch import Watch
        from fedtune.workflows.audit import audit

        watch = Watch(
            board.stage,
            board.advance,
            lambda reply: board.advance(1),
            note=lambda text: board.line(f"note: {text}"),
        )
        report = audit(
            checked,
            canaries=canaries,
            guesses=guesses,
            delta=delta,
            seed=_seed() if seed is None else seed,
            kind=kind.value,
            watch=watch,
        )
    if json_:
        out.print_json(json.dumps(report.to_json()))
    else:
        _show(report)
    report.require_consistent()


def _seed() -> int:
    import secrets

    return secrets.randbits(31)


def _show(report: "AuditReport") -> None:
    from fedtune.privacy.audit import CONFIDENCE
    from fedtune.report.format import count
    from fedtune.report.terminal import table

    o = report.outcome
    asked = (
        ()
        if report.rounds is None
        else (
            (
                "rounds",
                f"{report.rounds:.3g} of {report.charged}",
                "in which a canary's client was asked, of those the claim is for",
            ),
        )
    )
    rows = [
        ("canaries", count(o.canaries), f"{report.kind}; in or out by coins of seed {report.seed}"),
        *asked,
        ("guesses", count(o.guesses), f"{count(o.canaries - o.made)} abstained"),
        ("right", count(o.correct), f"{o.correct / o.guesses:.1%} of the guesses"),
        (
            "epsilon is at least",
            f"{o.lower:.3f}",
            f"with {CONFIDENCE:.0%} confidence, at delta = {o.delta:g}",
        ),
        ("the job claims", f"{report.claimed:.3f}", f"at the same delta; unit: {report.unit}"),
        *(
            ()
            if report.expected is None
            else (
                (
                    "a right one shows",
                    f"{report.expected:.3f}",
                    f"about, and one with half of the noise {report.halved:.3f}",
                ),
            )
        ),
        (
            "could have shown",
            f"{o.ceiling:.3f}",
            f"every guess right; {report.best:.3f} with the best number of guesses",
        ),
        (
            "verdict",
            report.verdict,
            "more is lost than is claimed"
            if report.verdict == "VIOLATION"
            else "nothing speaks against the claim; no proof of it",
        ),
    ]
    out.print(table(("", "figure", ""), rows, words=(0, 2)))
    out.print(Text(f"The attacker {report.attacker} ({report.engine} engine)."))
    for note in report.notes:
        out.print(Text(f"! {note}", style="yellow"))
