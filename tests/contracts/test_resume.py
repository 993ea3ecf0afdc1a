"""Stopped at any instant and resumed equals never stopped: model, metrics, ledger.

The processes are real and so are the kills.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedtune.runs.folder import RunFolder, open_run
from fedtune.runs.ledger import Ledger

GRADIENT = (
    "adapter.init=gradient",
    "adapter.init-clients=2",
    "adapter.init-examples=8",
    "adapter.init-step=0.01",
)
SERIAL = ("simulation.engine=serial",)
FLEET = (
    *GRADIENT,
    "adapter.init-clients=4",
    "federation.deadline=5.0",
    (
        'simulation.devices=[{name = "phone", speed = 4, up-kbps = 1000, available = 0.8, drop-out = 0.3}, '
        '{name = "laptop", down-kbps = 1000}]'
    ),
)
LISA = (
    "units.strategy=lisa",
    "units.budget=1",
    'simulation.devices=[{name = "any"}, {name = "own", units = 2}]',
)
RANKS = (
    *GRADIENT,
    "federation.cohort=4",
    "federation.server-optimizer=fedavgm",
    'simulation.devices=[{name = "small", rank = 2}, {name = "large"}]',
)
DITTO = ("personal.method=ditto",)
SCAFFOLD = ("federation.drift=scaffold", "federation.weighting=equal", "federation.optimizer=sgd")
SELDOM = ("evaluation.every=2",)
EXAMPLE = (
    "privacy.unit=example",
    "privacy.noise-multiplier=2.0",
    "privacy.clip=0.5",
    "privacy.examples=160",
    "federation.weighting=equal",
    "privacy.participations=2",
    "privacy.noise=seeded",
    "privacy.metrics-noise=5.0",
)
NOISY = ("adapter.init=gradient-dp", "adapter.init-step=0.01")
CLIENT = (
    "privacy.unit=client",
    "privacy.noise-multiplier=3.0",
    "privacy.clip=0.5",
    "federation.weighting=equal",
    "privacy.adaptive-clip=true",
    "privacy.noise=seeded",
)


def fedtune(arguments, log):
    """In a child process: the command line as typed, its output in a file."""
    sys.argv = ["fedtune", *map(str, arguments)]
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    from fedtune.cli.main import main

    main()


def fedtune_killed(arguments, log, owner, name, before, fits, count):
    """In a child process: as above, but SIGKILL comes right before or after the count-th call
    of owner.name that fits.
    """
    module, _, kind = owner.partition(":")
    holder = __import__(module, fromlist=["*"])
    holder = getattr(holder, kind) if kind else holder
    real, calls = getattr(holder, name), []

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(*args, **kwargs):
        calls.extend([1] if fits in repr(args) else [])
        now = len(calls) == count and fits in repr(args)
        if now and before:
            die()
        done = real(*args, **kwargs)
        if now:
            die()
        return done

    setattr(holder, name, watched)
    fedtune(arguments, log)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(target, *args) -> exit code.

    Children are forked from one clean process that has the imports done.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "fedtune.cli.main",
            "fedtune.workflows.simulate",
            "fedtune.workflows.finish",
            "fedtune.report.page",
            "transformers.models.bert.modeling_bert",
            "dp_accounting.pld",
            "dp_accounting.rdp",
            "opacus.accountants",
            "opacus.grad_sample",
        ]
    )

    def run(target, *args):
        child = context.Process(target=target, args=args)
        child.start()
        child.join(120)
        return child.exitcode

    return run


def simulate(tiny_settings, changes, folder):
    return [
        "simulate",
        *(part for value in (*tiny_settings, *SELDOM, *changes) for part in ("--set", value)),
        "--out",
        folder,
    ]


def left(folder: Path):
    """All that must be equal: first and newest checkpoint, metrics but for the clock, ledger,
    bundle; all byte for byte.
    """
    run = open_run(folder)
    lines = [line | {"seconds": 0} for line in run.metrics()]
    found = sorted((folder / "checkpoints").glob("round-*"))
    checkpoints = {p.name: p.read_bytes() for p in (found[0], found[-1])}
    bundle = {p.name: p.read_bytes() for p in (folder / "bundle").glob("[a-z]*")}
    kept = {str(p.relative_to(folder)): p.read_bytes() for p in run.clients.rglob("*.safetensors")}
    return checkpoints, lines, Ledger(run.ledger).events(), bundle, kept


@pytest.fixture(scope="module")
def never_stopped(start, tiny_settings, tmp_path_factory):
    """What a whole run leaves, by the changes made to its job."""
    found = {}

    def get(changes):
        if changes not in found:
            folder = tmp_path_factory.mktemp("whole") / "run"
            assert start(fedtune, simulate(tiny_settings, changes, folder), folder.with_suffix(".log")) == 0
            found[changes] = left(folder)
        return found[changes]

    return get


INSTANTS = {
    "the folder is there, nothing else": ("fedtune.workflows.simulate:Simulation", "rounds", True, "", 1, ()),
    "the frame is written, the manifest not": (
        "fedtune.bundles.bundle",
        "write_json",
        True,
        "manifest",
        1,
        (),
    ),
    "the bundle is whole, no checkpoint yet": (
        "fedtune.runs.folder:RunFolder",
        "append_metrics",
        True,
        "",
        1,
        (),
    ),
    "some gradients came": ("fedtune.training.worker:Worker", "handle", False, "", 1, GRADIENT),
    "all gradients came, no frame yet": ("fedtune.adapters.frames", "from_gradients", True, "", 1, GRADIENT),
    "the ledger says round 2 goes out": ("fedtune.runs.ledger:Ledger", "record", False, "2, {", 1, ()),
    "round 2's clients are trained": ("fedtune.training.cohort:CohortTrainer", "train", False, "", 2, ()),
    "drawn units: some clients are trained": (
        "fedtune.training.cohort:CohortTrainer",
        "train",
        False,
        "",
        3,
        LISA,
    ),
    "drawn units: round 2 is in metrics, not in a checkpoint": (
        "fedtune.runs.folder:RunFolder",
        "append_metrics",
        False,
        "'round': 2",
        1,
        LISA,
    ),
    "unequal ranks: some clients are trained": (
        "fedtune.training.cohort:CohortTrainer",
        "train",
        False,
        "",
        3,
        RANKS,
    ),
    "one of round 2's clients answered": ("fedtune.training.worker:Worker", "handle", False, "", 3, SERIAL),
    "round 2 is in metrics, not in a checkpoint": (
        "fedtune.runs.folder:RunFolder",
        "append_metrics",
        False,
        "'round': 2",
        1,
        (),
    ),
    "devices: the gradients came, no frame yet": (
        "fedtune.adapters.frames",
        "from_gradients",
        True,
        "",
        1,
        FLEET,
    ),
    "devices: round 2 is in metrics, not in a checkpoint": (
        "fedtune.runs.folder:RunFolder",
        "append_metrics",
        False,
        "'round': 2",
        1,
        FLEET,
    ),
    "noisy gradients: the frame is there, no checkpoint": (
        "fedtune.bundles.bundle",
        "write_json",
        False,
        "manifest",
        1,
        (*EXAMPLE, *NOISY),
    ),
    "noisy gradients, devices: the frame is there, no checkpoint": (
        "fedtune.bundles.bundle",
        "write_json",
        False,
        "manifest",
        1,
        (*FLEET, *CLIENT, *NOISY, "federation.rounds=2"),
    ),
    "example level: round 2 is charged, nobody asked": (
        "fedtune.runs.ledger:Ledger",
        "record",
        False,
        "2, {",
        1,
        EXAMPLE,
    ),
    "client level: round 2's noise is drawn, nothing kept": (
        "fedtune.runs.folder:RunFolder",
        "save",
        True,
        "State(round=2",
        1,
        CLIENT,
    ),
    "client level: round 2's model is kept, not scored": (
        "fedtune.runs.folder:RunFolder",
        "save",
        False,
        "State(round=2",
        1,
        CLIENT,
    ),
    "client level: round 2 is in metrics, its checkpoint unfinished": (
        "fedtune.runs.folder:RunFolder",
        "append_metrics",
        False,
        "'round': 2",
        1,
        CLIENT,
    ),
    "client level: the last model is kept, not scored": (
        "fedtune.workflows.simulate:Simulation",
        "evaluate",
        True,
        ", 3, {",
        1,
        CLIENT,
    ),
    "round 2's checkpoint is written, not in its place": ("os", "replace", True, "round-00002", 1, ()),
    "round 3's checkpoint is there, the old one too": (
        "fedtune.runs.folder",
        "save_checkpoint",
        False,
        "round-00003",
        1,
        (),
    ),
    "own models: one of round 2's clients wrote down what it keeps": (
        "fedtune.stateful.store:Kept",
        "save",
        False,
        ", 2, {",
        1,
        DITTO,
    ),
    "own models: all of round 3's clients answered, no checkpoint": (
        "fedtune.runs.folder",
        "save_checkpoint",
        True,
        "round-00003",
        1,
        DITTO,
    ),
    "controls: round 2's first client sent nothing of what it wrote down": (
        "fedtune.stateful.store:Kept",
        "save",
        False,
        ", 2, {",
        1,
        SCAFFOLD,
    ),
    "all rounds are done, the summary is not": ("fedtune.workflows.finish", "write_summary", True, "", 1, ()),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_and_resumed_is_never_stopped(instant, start, never_stopped, tiny_settings, tmp_path):
    *where, changes = INSTANTS[instant]
    folder, log = tmp_path / "run", tmp_path / "log"
    assert start(fedtune_killed, simulate(tiny_settings, changes, folder), log, *where) == -signal.SIGKILL, (
        log.read_text()
    )
    before = len(open_run(folder).metrics())
    assert start(fedtune, ["simulate", "--resume", folder], log) == 0, log.read_text()
    assert left(folder) == never_stopped(changes)
    assert before <= 4 and RunFolder(folder).summary.exists()


def test_what_was_charged_stays_charged_and_only_once(start, tiny_settings, tmp_path):
    """With noise that nobody can draw again: the models differ, the ledger does not."""
    changes = (*EXAMPLE, "privacy.noise=system")
    whole, folder, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert start(fedtune, simulate(tiny_settings, changes, whole), log) == 0, log.read_text()
    assert (
        start(
            fedtune_killed,
            simulate(tiny_settings, changes, folder),
            log,
            "fedtune.training.cohort:CohortTrainer",
            "train",
            False,
            "",
            2,
        )
        == -signal.SIGKILL
    )
    assert start(fedtune, ["simulate", "--resume", folder], log) == 0, log.read_text()
    assert left(folder)[2] == left(whole)[2] and left(folder)[0] != left(whole)[0]


def test_of_a_noisy_frame_one_version_is_ever_seen(start, tiny_settings, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = simulate(tiny_settings, (*CLIENT, *NOISY, "privacy.noise=system"), folder)
    assert (
        start(fedtune_killed, settings, log, "fedtune.bundles.bundle", "write_json", False, "manifest", 1)
        == -signal.SIGKILL
    ), log.read_text()
    frame = (folder / "bundle" / "frame.safetensors").read_bytes()
    assert start(fedtune, ["simulate", "--resume", folder], log) == 0, log.read_text()
    assert (folder / "bundle" / "frame.safetensors").read_bytes() == frame
    assert [event.round for event in Ledger(open_run(folder).ledger).events()] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "instant",
    [
        ("fedtune.runs.folder:RunFolder", "save", False, "State(round=2", 1),
        ("fedtune.workflows.simulate:Simulation", "scores", False, "", 2),
        ("fedtune.runs.folder:RunFolder", "append_metrics", False, "'round': 2", 1),
    ],
    ids=["kept", "scored", "shown"],
)
def test_of_a_noisy_model_one_version_is_ever_seen(instant, start, tiny_settings, tmp_path):
    """With noise that nobody can draw again: what was kept before the kill is what the
    resumed run goes on with.
    """
    changes = (
        *CLIENT,
        "privacy.noise=system",
        "evaluation.every=1" if instant[1] == "scores" else "evaluation.every=2",
    )
    folder, log = tmp_path / "run", tmp_path / "log"
    assert (
        start(fedtune_killed, simulate(tiny_settings, changes, folder), log, *instant) == -signal.SIGKILL
    ), log.read_text()
    before = open_run(folder).newest()
    assert (
        before is not None
        and before.unfinished is not None
        and before.state.round == (1 if instant[1] == "scores" else 2)
    )
    resumed = ["simulate", "--resume", folder]
    assert (
        start(fedtune_killed, resumed, log, "fedtune.round.coordinator:Coordinator", "plan", True, "", 1)
        == -signal.SIGKILL
    ), log.read_text()
    after = open_run(folder).newest()
    assert after.unfinished is None and after.state.round == before.state.round
    assert all(np.array_equal(array, after.state.arrays[name]) for name, array in before.state.arrays.items())
    assert len(open_run(folder).metrics()) == before.state.round + 1
    assert start(fedtune, resumed, log) == 0, log.read_text()
    assert [event.round for event in Ledger(open_run(folder).ledger).events()] == [1, 2, 3]


def test_killed_again_and_again(start, never_stopped, tiny_settings, tmp_path):
    """Each life gets one round further, and dies in the next one."""
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = simulate(tiny_settings, (), folder)
    for _ in range(2):
        assert (
            start(
                fedtune_killed, arguments, log, "fedtune.training.cohort:CohortTrainer", "train", True, "", 2
            )
            == -signal.SIGKILL
        )
        arguments = ["simulate", "--resume", folder]
    assert len(open_run(folder).metrics()) == 3
    assert start(fedtune, arguments, log) == 0
    assert left(folder) == never_stopped(())


def test_resuming_a_finished_run_changes_nothing(start, tiny_settings, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert start(fedtune, simulate(tiny_settings, (), folder), log) == 0
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert start(fedtune, ["simulate", "--resume", folder], log) == 0
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_ctrl_c_says_how_to_go_on(start, never_stopped, tiny_settings, tmp_path):
    changes, folder, log = ("federation.rounds=60",), tmp_path / "run", tmp_path / "log"
    command = [
        sys.executable,
        "-c",
        "from fedtune.cli.main import main; main()",
        *map(str, simulate(tiny_settings, changes, folder)),
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert any(line.startswith("round 2/60:") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines() == [
        f"stopped; continue with: fedtune simulate --resume {folder}",
        "fedtune: interrupted",
    ]
    assert 3 <= len(open_run(folder).metrics()) < 61
    assert start(fedtune, ["simulate", "--resume", folder], log) == 0, log.read_text()
    assert left(folder) == never_stopped(changes)
