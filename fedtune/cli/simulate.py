"""fedtune simulate: runs a job with simulated clients."""

from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.common import JobArgument, SetOption, err, out, shell
from fedtune.errors import UserError
from fedtune.job import load_job
from fedtune.run import create_run, next_run_path, open_run

EXAMPLES = "Examples:  fedtune simulate   |   fedtune simulate job.toml --set federation.rounds=2 --out runs/try   |   fedtune simulate --resume runs/try"


@shell
def command(
    job: JobArgument = None,
    set_: SetOption = None,
    out_: Annotated[Path | None, typer.Option("--out", help="Run folder to make (default: runs/METHOD-001, -002…).", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same as --set federation.seed=N.", show_default=False)] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Continue this run folder from its last finished round.", show_default=False)] = None,
) -> None:
    """Runs the whole job on this machine and leaves a run folder."""
    if resume and (job or set_ or out_ or seed is not None):
        raise UserError("--resume takes the job from the run folder; remove the job, --set, --out and --seed")
    run = open_run(resume) if resume else None
    checked = run.job() if run else load_job(job, [*(set_ or ()), *([f"federation.seed={seed}"] if seed is not None else [])])
    from fedtune.report.summary import load_summary
    from fedtune.report.terminal import show
    from fedtune.workflows.finish import finish
    from fedtune.workflows.setup import open_setup, versions
    from fedtune.workflows.simulate import Simulation, Watch

    setup = open_setup(checked)
    run = run or create_run(out_ or next_run_path(Path("runs"), checked.adapter.method), checked, {"versions": versions(), "sha256": setup.sha256})
    out.print(f"run folder: {run.path}", markup=False, highlight=False, soft_wrap=True)
    try:
        simulation = Simulation(setup, run, Watch(line=_show))
        simulation.rounds()
        finish(simulation, _stage)
    except KeyboardInterrupt:
        err.print(f"interrupted; continue with: fedtune simulate --resume {run.path}", markup=False, highlight=False, soft_wrap=True)
        raise
    show(load_summary(run.path), out)
    if checked.report.html:
        out.print(f"page: {run.page.resolve()}", markup=False, highlight=False, soft_wrap=True)


def _stage(text: str) -> None:
    out.print(text, markup=False, highlight=False)


def _show(line: dict) -> None:
    accuracy = "not evaluated" if line["accuracy"] is None else f"accuracy {line['accuracy']:.3f}, loss {line['loss']:.3f} on {line['evaluated']} held-out"
    out.print(f"round {line['round']}: {accuracy}; {line['total_bytes']:,} bytes so far, {line['seconds']:.1f} s", markup=False, highlight=False)
