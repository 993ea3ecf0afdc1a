"""fedtune simulate: runs a job with simulated clients."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.common import JobArgument, SetOption, UnderstandOption, err, no_dash, out, overrides, shell
from fedtune.cli.progress import Board
from fedtune.errors import UserError
from fedtune.job import Job, load_job
from fedtune.report.format import duration, number, size
from fedtune.round.watch import Watch
from fedtune.runs.folder import RunFolder, open_run

EXAMPLES = (
    "Examples:  fedtune simulate   |   "
    "fedtune simulate job.toml --set federation.rounds=2 --out runs/try   |   "
    "fedtune simulate --resume runs/try"
)


@shell
def command(
    job: JobArgument = None,
    set_: SetOption = None,
    out_: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=no_dash,
            help="Run folder to make (default: runs/METHOD-001, -002…).",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Same as --set federation.seed=N.", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", help="Continue this run folder from its last finished round.", show_default=False
        ),
    ] = None,
    understand: UnderstandOption = False,
) -> None:
    """Runs the whole job on this machine and leaves a run folder with the adapter,
    the report and the exports.
    """
    if resume and (job or set_ or out_ or seed is not None or understand):
        raise UserError(
            "--resume takes the job from the run folder; remove the job, --set, "
            "--out, --seed and --i-understand"
        )
    run = open_run(resume) if resume else None
    checked = (
        run.job()
        if run
        else load_job(
            job, [*overrides(set_, understand), *([f"federation.seed={seed}"] if seed is not None else [])]
        )
    )
    from fedtune.report.summary import is_whole, load_summary

    if not (run and is_whole(run.path)):
        run = _run(run, checked, out_)
    from fedtune.report.terminal import show

    show(load_summary(run.path), out)
    if checked.report.html:
        out.print(f"page: {run.page.resolve()}", markup=False, highlight=False, soft_wrap=True)


def _run(run: RunFolder | None, job: Job, path: Path | None) -> RunFolder:
    with Board(out) as board:
        from fedtune.workflows.simulation import simulate

        progress, begun = Progress(board, job.federation.rounds), list[RunFolder]()
        watch = Watch(
            board.stage,
            board.advance,
            lambda reply: progress.reply(),
            progress.line,
            lambda text: board.line(f"note: {text}"),
        )

        def began(run: RunFolder) -> None:
            begun.append(run)
            board.line(f"run folder: {run.path}")

        try:
            return simulate(job, run, path, watch, began)
        except KeyboardInterrupt:
            for run in begun:
                err.print(
                    f"stopped; continue with: fedtune simulate --resume {run.path}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            raise


class Progress:
    """One step a client, one line a round."""

    def __init__(self, board: Board, rounds: int) -> None:
        self.board, self.rounds, self.note = board, rounds, ""

    def reply(self) -> None:
        self.board.advance(1, self.note)

    def line(self, line: dict[str, Any]) -> None:
        self.note = f"round {min(line['round'] + 1, self.rounds)}/{self.rounds}"
        self.board.line(round_text(line, self.rounds))


def round_text(line: dict[str, Any], rounds: int) -> str:
    """One line of metrics.jsonl for people."""
    measured = "not evaluated"
    if line["evaluated"]:
        measured = (
            f"accuracy {number(line['accuracy'])}, loss {number(line['loss'])} on "
            f"{line['evaluated']:,} held-out"
        )
    if line.get("personal_clients"):
        measured += (
            f"; personal accuracy {number(line['personal_accuracy'])} of {line['personal_clients']:,} clients"
        )
    refused = f"; {len(line['refused'])} refused" if line["refused"] else ""
    lost = _lost(line) if line.get("simulated_seconds") else ""
    return (
        f"round {line['round']}/{rounds}: {measured}; {size(line['total_bytes'])} so far, "
        f"{line['seconds']:.1f} s{lost}{refused}"
    )


def _lost(line: dict[str, Any]) -> str:
    """What devices did to a round."""
    dropped, late = (
        f", {len(line[key])} {what}" if line[key] else ""
        for key, what in (("dropped", "dropped out"), ("stragglers", "past the deadline"))
    )
    return f" ({duration(line['simulated_seconds'])} simulated{dropped}{late})"
