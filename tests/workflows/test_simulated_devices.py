"""Whole simulations on device classes: times in closed form from the job and the data,
resuming, the reports, the plan.
"""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.errors import JobError
from fedtune.report import compare, facts, page, terminal
from fedtune.report.summary import check, load_summary
from fedtune.round.gradient_init import gradient_bytes
from fedtune.runs.folder import open_run
from fedtune.simulation.devices import assign
from fedtune.wire import packet_bytes
from fedtune.workflows import summary as summaries
from fedtune.workflows.finish import finish
from fedtune.workflows.fleet import make_fleet
from fedtune.workflows.plan import make_plan
from fedtune.workflows.setup import open_setup
from fedtune.workflows.simulate import Simulation

FLEET = (
    'simulation.devices=[{name = "phone", share = 2, speed = 5, up-kbps = 100, down-kbps = 1000, '
    'available = 0.8, drop-out = 0.2}, {name = "laptop", speed = 50, up-kbps = 1000, down-kbps = 10000}]'
)
DEADLINE = "federation.deadline=40.0"
LARGE = "federation.batch-size=32"  # a step of the tiny base then needs between 1 and 2 MB


def left(run):
    """Everything of the rounds but the clock on the wall."""
    return {p.name: p.read_bytes() for p in (run.path / "checkpoints").iterdir()}, [
        line | {"seconds": 0} for line in run.metrics()
    ]


def test_devices_without_limits_change_nothing_but_what_is_said(tiny_job, run_rounds, tmp_path):
    plain, fleet = (
        run_rounds(tiny_job(), tmp_path / "plain").run,
        run_rounds(tiny_job('simulation.devices=[{name = "any"}]'), tmp_path / "fleet").run,
    )
    (checkpoints, lines), (others, said) = left(plain), left(fleet)
    assert checkpoints == others
    assert [{key: line[key] for key in old} for line, old in zip(said, lines, strict=True)] == lines
    assert set(said[1]) - set(lines[1]) == {"simulated_seconds", "dropped", "stragglers", "devices"}
    assert "devices" not in summaries.facts(plain) and "devices" not in (plain.path / "job.toml").read_text()
    assert all(line["simulated_seconds"] == 0.0 for line in said)


@pytest.mark.parametrize("changes", [(), ("federation.local-steps=2", "federation.local-epochs=2")])
def test_times_are_those_of_the_job_and_the_data(changes, tiny_job, run_rounds, tmp_path):
    """From scratch: who has which class, what each trained on, and what was sent."""
    job = tiny_job(FLEET, DEADLINE, "federation.rounds=6", "federation.cohort=3", *changes)
    simulation = run_rounds(job, tmp_path / "run")
    setup, lines, fed = simulation.setup, simulation.run.metrics(), job.federation
    model, update = packet_bytes(setup.spec.schema)
    classes = dict(zip(setup.split.clients, assign(fed.seed, job.simulation.devices, 6).tolist()))
    frame, met = (simulation.run.path / "bundle" / "frame.safetensors").stat().st_size, set()
    for line in lines[1:]:
        asked = [*line["clients"], *line["dropped"], *line["stragglers"]]
        assert (
            len(asked) <= 3
            and not line["refused"]
            and all(
                sum(d[k] for d in line["devices"].values()) == n
                for k, n in (("asked", len(asked)), ("used", len(line["clients"])))
            )
        )
        took = {}
        for name in asked:
            device, examples = job.simulation.devices[classes[name]], len(setup.store.train(name))
            # every client has at least 8 examples: 2 whole batches of 8
            run = min(16, 2 * examples) if changes else examples
            took[name] = (
                8 * (model + (0 if name in met else frame)) / (1000 * device.down_kbps)
                + run / device.speed
                + 8 * update / (1000 * device.up_kbps)
            )
            met.add(name)
        assert all(
            (took[name] > 40) == (name in line["stragglers"]) for name in asked if name not in line["dropped"]
        )
        expected = 40.0 if len(asked) > len(line["clients"]) else max(took[name] for name in line["clients"])
        assert line["simulated_seconds"] == pytest.approx(expected, abs=1e-3)
    assert sum(d["up"] for line in lines for d in line["devices"].values()) == lines[-1]["up"]
    assert sum(d["down"] for line in lines for d in line["devices"].values()) == lines[-1]["down"]


def test_a_gradient_init_takes_time_and_may_lose_clients(tiny_job, run_rounds, tmp_path):
    changes = (
        "adapter.init=gradient",
        "adapter.init-clients=6",
        "adapter.init-examples=8",
        "federation.rounds=1",
    )
    simulation = run_rounds(
        tiny_job(
            *changes, 'simulation.devices=[{name = "a", speed = 4, up-kbps = 80, drop-out = 0.4}]', DEADLINE
        ),
        tmp_path / "run",
    )
    line, (request, gradient) = simulation.run.metrics()[0], gradient_bytes(simulation.setup.spec)
    tally = line["devices"]["a"]
    assert 0 < tally["dropped"] == len(line["dropped"]) < 6 and tally["used"] == 6 - tally["dropped"]
    assert (
        (line["up"], line["down"]) == (tally["used"] * gradient, 6 * request) == (tally["up"], tally["down"])
    )
    assert line["simulated_seconds"] == 40.0 and tally["seconds"] == pytest.approx(
        tally["used"] * (8 / 4 + 8 * gradient / 80_000), abs=1e-2
    )


class Stopped(Exception):
    pass


def test_stopped_and_resumed_is_never_stopped(tiny_job, run_rounds, tmp_path):
    job = tiny_job(FLEET, DEADLINE, "federation.rounds=5")
    whole = run_rounds(job, tmp_path / "whole").run
    assert sum(len(line["dropped"]) + len(line["stragglers"]) for line in whole.metrics()) > 0

    def stop(line):
        if line["round"] == 3:
            raise Stopped

    simulation = Simulation(
        open_setup(job), run_rounds(tiny_job(FLEET, DEADLINE, "federation.rounds=5"), tmp_path / "again").run
    )
    for file in [*(simulation.run.path / "checkpoints").iterdir()]:
        file.unlink()
    (simulation.run.path / "metrics.jsonl").unlink()
    (simulation.run.path / "ledger.sqlite").unlink()
    simulation.watch = type(simulation.watch)(line=stop)
    with pytest.raises(Stopped):
        simulation.rounds()
    assert len(simulation.run.metrics()) == 4
    Simulation(open_setup(job), open_run(simulation.run.path)).rounds()
    assert left(simulation.run) == left(whole)


def test_memory_keeps_a_class_out(tiny_job, run_rounds, tmp_path):
    need = make_plan(tiny_job(LARGE)).device["total"]
    assert need is not None and 1_000_000 < need < 2_000_000
    job = tiny_job(
        LARGE,
        'simulation.devices=[{name = "small", memory-mb = 1}, {name = "large", memory-mb = 2}]',
        "federation.cohort=6",
        "federation.rounds=1",
    )
    line = run_rounds(job, tmp_path / "run").run.metrics()[1]
    small, large = line["devices"]["small"], line["devices"]["large"]
    assert small["clients"] > 0 == small["able"] == small["asked"] and large["asked"] == large[
        "clients"
    ] == len(line["clients"])


def test_a_fleet_that_cannot_train_is_refused_before_anything_is_written(
    tiny_settings, tiny_job, tmp_path, monkeypatch
):
    settings = [
        part
        for value in (*tiny_settings, LARGE, 'simulation.devices=[{name = "small", memory-mb = 1}]')
        for part in ("--set", value)
    ]
    done = CliRunner().invoke(app, ["simulate", *settings, "--out", str(tmp_path / "run")])
    assert done.exit_code == 2 and not (tmp_path / "run").exists()
    assert (
        "simulation.devices: memory-mb = 1: a training step needs 1." in done.stderr
        and "give a class memory-mb = 2" in done.stderr
    )
    monkeypatch.setattr("fedtune.training.memory.saved_bytes", lambda *args: None)
    with pytest.raises(
        JobError,
        match=(
            "memory-mb = 1: what a step of this base needs cannot be computed from shapes; set memory-mb to 0"
        ),
    ):
        make_fleet(open_setup(tiny_job('simulation.devices=[{name = "small", memory-mb = 1}]')))
    assert make_fleet(open_setup(tiny_job())) is None


@pytest.fixture(scope="module")
def told(tiny_job, run_rounds, tmp_path_factory):
    """(folder, summary) of a finished run on two classes of devices."""
    simulation = run_rounds(
        tiny_job(FLEET, DEADLINE, "federation.rounds=5", "report.html=true"),
        tmp_path_factory.mktemp("told") / "run",
    )
    finish(simulation)
    return simulation.run, load_summary(simulation.run.path)


def test_the_summary_adds_up(told):
    run, summary = told
    lines, classes = run.metrics(), summary["devices"]
    clock = np.cumsum([line["simulated_seconds"] for line in lines])
    assert [r["simulated_clock"] for r in summary["rounds"]] == pytest.approx(clock.tolist(), abs=1e-2)
    assert [c["name"] for c in classes] == ["phone", "laptop"] and sum(c["clients"] for c in classes) == 6
    assert (
        sum(c["up"] for c in classes) == summary["communication"]["up"]
        and sum(c["down"] for c in classes) == summary["communication"]["down"]
    )
    for key, found in (("dropped", "dropped"), ("stragglers", "stragglers"), ("used", "clients")):
        assert sum(c[key] for c in classes) == sum(len(line[found]) for line in lines)
    assert check(json.loads(json.dumps(summary))) == summary


def test_page_terminal_and_comparison_show_it(told, tiny_job, run_rounds, tmp_path):
    run, summary = told
    html = run.page.read_text()
    assert html == page.render(summary)
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    terminal.show(summary, console)
    plain = console.file.getvalue()
    for text in (facts.fleet(summary), "simulated time", "phone", "laptop"):
        assert text in html and text in " ".join(plain.split())
    assert 'id="run-accuracy-time"' in html and 'id="run-loss-time"' in html and 'id="devices"' in html
    assert max(len(line) for line in plain.splitlines()) <= 80
    assert summary["job"]["simulation"]["devices"][0]["drop-out"] == 0.2 and "drop-out 0.2" in html

    other = run_rounds(tiny_job("federation.rounds=1"), tmp_path / "other")
    finish(other)
    runs = [summary, load_summary(other.run.path)]
    assert (
        compare.header(runs)[-1] == "simulated time"
        and compare.rows(runs)[1][-1] == "—"
        and 'id="compare-time"' in compare.render(runs)
    )
    assert compare.header(runs[1:]) == compare.HEADER and "compare-time" not in compare.render(runs[1:])
    assert "run-accuracy-time" not in page.render(runs[1]) and "devices" not in "".join(
        facts.notices(runs[1])
    )


def test_a_line_for_people_says_what_a_round_took(tiny_settings, tmp_path):
    settings = [
        part
        for value in (*tiny_settings, 'simulation.devices=[{name = "brick", drop-out = 1.0}]', DEADLINE)
        for part in ("--set", value)
    ]
    done = CliRunner().invoke(app, ["simulate", *settings, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "(40 s simulated, 2 dropped out)" in done.stdout


def test_a_plan_says_what_a_round_takes_on_each_class(tiny_job):
    job = tiny_job(FLEET, "federation.deadline=2")
    plan, setup = make_plan(job), open_setup(job)
    model, update = packet_bytes(setup.spec.schema)
    examples = np.mean([len(index) for index in setup.split.train])
    phone, laptop = plan.devices
    assert (phone.down, phone.train, phone.up) == pytest.approx(
        (8 * model / 1e6, examples / 5, 8 * update / 1e5)
    )
    assert phone.seconds == pytest.approx(
        phone.down + phone.train + phone.up
    ) and phone.frame == pytest.approx(8 * plan.frame_bytes / 1e6)
    assert [phone.clients, laptop.clients] == np.bincount(assign(0, job.simulation.devices, 6)).tolist()
    assert any(
        note.startswith("phone: a round takes ") and "federation.deadline = 2 s" in note
        for note in plan.notes
    )
    assert plan.to_json()["devices"][0]["seconds"] == phone.seconds
    small = make_plan(
        tiny_job(LARGE, 'simulation.devices=[{name = "small", memory-mb = 1, speed = 1}, {name = "large"}]')
    )
    assert [d.able for d in small.devices] == [False, True] and any(
        note.startswith("small: memory-mb = 1, a training step needs 1.") for note in small.notes
    )
    blind = make_plan(tiny_job(FLEET, "data.source=none.csv", 'data.labels=["bad", "good"]'))
    assert blind.devices[0].seconds is None and blind.devices[0].down == phone.down
    assert make_plan(tiny_job()).devices == ()


def test_the_plan_is_printed(tiny_settings):
    settings = [part for value in (*tiny_settings, FLEET) for part in ("--set", value)]
    done = CliRunner().invoke(app, ["plan", *settings])
    assert (
        done.exit_code == 0
        and "A round of one client, in simulated time" in done.stdout
        and "phone" in done.stdout
    )
