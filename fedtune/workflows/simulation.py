"""A whole simulation: open, check, run, finish."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from fedtune.aggregation.rules import Rule
from fedtune.algorithms.fed_avg import Draw
from fedtune.errors import UserError
from fedtune.job import Job
from fedtune.round.algorithm import make_algorithm, require_kept_promises
from fedtune.round.watch import Watch
from fedtune.runs.folder import RunFolder, create_run, next_run_path
from fedtune.simulation.engines import ENGINES
from fedtune.workflows.finish import finish
from fedtune.workflows.fleet import make_fleet
from fedtune.workflows.setup import (
    Setup,
    open_setup,
    require_trainable,
    require_unchanged,
    run_facts,
    with_noise,
)
from fedtune.workflows.simulate import Simulation, require_device


def simulate(
    job: Job,
    run: RunFolder | None = None,
    path: Path | None = None,
    watch: Watch | None = None,
    began: Callable[[RunFolder], None] = lambda run: None,
    rule: Rule | None = None,
    draw: Draw | None = None,
    own: Mapping[str, str] = MappingProxyType({}),
    setup: Setup | None = None,
) -> RunFolder:
    """Simulates a job to its end and gives its run folder, with adapter, report and exports in it.

    What does not fit the base or this machine is said before anything is written.

    Args:
        job: of `run`, where that is given.
        run: continued from its last finished round; None: a new one.
        path: of a new run; None: the next free one in runs.
        began: called once with the run folder, before the first round.
        rule, draw: as `make_algorithm`.
        own: names of what is given here in place of the job's, for run.json:
            a run goes on with the same alone.
        setup: of the job, opened and with its noise, where the caller has it.

    Raises UserErrors and PrivacyRefused of one line, EnvironmentProblem for a device that is not there.
    """
    watch = watch or Watch()
    watch.stage("opening the base and the data", 0)
    setup = setup or with_noise(open_setup(job), watch.note)
    require_trainable(setup)
    _ = setup.spec
    base = setup.fresh_model()
    _ = setup.encoder
    require_device(setup.job.simulation)
    make_fleet(setup)  # devices none of which could train
    if rule or draw:
        make_algorithm(setup.job, setup.schema, rule=rule, draw=draw)
        require_kept_promises(setup.job, setup.schema, setup.store.clients, rule, draw)
    if own and not ENGINES[setup.job.simulation.engine].inside:
        raise UserError(
            f"simulation.engine = {setup.job.simulation.engine!r}: its processes "
            "cannot be given objects of "
            'Python; use "vectorised" or "serial"'
        )
    if run is None:
        run = create_run(
            path or next_run_path(Path("runs"), setup.job.adapter.method), setup.job, run_facts(setup, own)
        )
    else:
        require_unchanged(setup, run, own)
    began(run)
    simulation = Simulation(setup, run, watch, base, rule, draw)
    with run.locked():
        simulation.rounds()
        finish(simulation)
    return run
