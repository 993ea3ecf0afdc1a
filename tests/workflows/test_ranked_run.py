"""Whole runs on unequal ranks: against runs of one rank, the plan's figures against the
run's, and what reports say.
"""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedtune.algorithms.units import Limits
from fedtune.cli.main import app
from fedtune.errors import UserError
from fedtune.report import facts, page, terminal
from fedtune.report.summary import check, load_summary
from fedtune.round.traffic import Traffic
from fedtune.simulation.devices import assign
from fedtune.wire import packet_bytes
from fedtune.workflows.audit import audit
from fedtune.workflows.finish import finish
from fedtune.workflows.plan import make_plan
from fedtune.workflows.setup import open_setup
from fedtune.workflows.summary import communication

CLASSES = 'simulation.devices=[{name = "small", rank = 2, up-kbps = 8}, {name = "large", up-kbps = 8}]'
ALL = ("federation.cohort=6", "federation.deadline=1000")


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (
            "adapter.init=gradient",
            "adapter.init-clients=3",
            "adapter.init-examples=8",
            "adapter.init-step=0.05",
        ),
        ("federation.server-optimizer=fedadam", "federation.server-lr=0.01"),
    ],
    ids=" ".join,
)
def test_where_all_have_a_lower_rank_the_run_is_that_of_a_job_of_that_rank(
    changes, tiny_job, run_rounds, tmp_path
):
    lower = run_rounds(
        tiny_job("adapter.rank=4", 'simulation.devices=[{name = "small", rank = 2}]', *changes),
        tmp_path / "lower",
    )
    plain = run_rounds(tiny_job("adapter.rank=2", *changes), tmp_path / "plain")
    ranks, found = lower.worker.open().ranks, lower.run.newest().state.arrays
    for name, array in plain.run.newest().state.arrays.items():
        np.testing.assert_allclose(
            ranks.join({n: found[n] for n in found}, 2)[name], array, rtol=0, atol=2e-5, err_msg=name
        )
    start = lower.run.first_arrays()
    assert all(np.array_equal(found[t.name], start[t.name]) == (t.rank == 4) for t in ranks.schema.tensors)
    if not changes:  # what lies beyond starts at 0 and so has no part in what is scored
        for one, two in zip(lower.run.metrics(), plain.run.metrics(), strict=True):
            assert one["clients"] == two["clients"] and one["loss"] == pytest.approx(two["loss"], abs=1e-5)


@pytest.fixture(scope="module")
def told(tiny_job, run_rounds, tmp_path_factory):
    """A finished run of all six clients, with its summary and plan."""
    job = tiny_job(
        CLASSES, *ALL, "report.html=true", 'evaluation.baselines=["local"]', "evaluation.local-clients=0"
    )
    simulation = run_rounds(job, tmp_path_factory.mktemp("told") / "run")
    finish(simulation)
    return simulation, load_summary(simulation.run.path), make_plan(job)


def test_bytes_and_times_are_those_of_the_plan(told):
    simulation, _, plan = told
    job, lines, schema = simulation.setup.job, simulation.run.metrics(), simulation.setup.schema
    small = int((assign(0, job.simulation.devices, 6) == 0).sum())
    assert 0 < small < 6 and [(d.name, d.clients, d.rank) for d in plan.devices] == [
        ("small", small, 2),
        ("large", 6 - small, 4),
    ]
    assert lines[-1]["total_bytes"] == 3 * plan.round_bytes + 6 * plan.frame_bytes and plan.ranks == (2, 4)
    for device, rank in zip(plan.devices, (2, 4)):
        held = schema.held(rank)
        names = None if rank == 4 else tuple(t.name for t in held.tensors)
        assert (device.model_bytes, device.update_bytes) == packet_bytes(
            schema, names, rank
        ) and device.numbers == held.size
        counted = lines[-1]["devices"][device.name]
        assert (
            counted["up"] == counted["used"] * device.update_bytes
            and counted["down"] == counted["used"] * device.model_bytes
        )
        assert counted["seconds"] == pytest.approx(
            counted["up"] / 1000, abs=1e-3
        ) and device.up == pytest.approx(device.update_bytes / 1000)
    assert (
        lines[-1]["ranks"] == {"2": small, "4": 6 - small} and plan.devices[0].numbers == 12 * 4 + plan.head
    )
    assert (
        plan.devices[1].numbers == plan.trainable == 12 * 16 + plan.head
        and plan.update_bytes == plan.devices[1].update_bytes
    )


def test_memory_is_that_of_the_rank(tiny_job):
    setup, plain = (open_setup(tiny_job(*changes)) for changes in ((CLASSES,), ("adapter.rank=2",)))
    assert (
        setup.step_memory(Limits(rank=2))
        == plain.step_memory()
        < setup.step_memory()
        == setup.step_memory(Limits(rank=4))
    )


def test_ranks_and_blocks_together(tiny_job, run_rounds, tmp_path):
    """A client of a lower rank and a budget of one block trains the pieces of both,
    and bytes are still those of the plan.
    """
    classes = 'simulation.devices=[{name = "small", rank = 2, units = 1}, {name = "large", rank = 3}]'
    job = tiny_job("units.strategy=top", "units.budget=2", classes, *ALL)
    simulation = run_rounds(job, tmp_path / "run")
    plan, line, (start, end) = (
        make_plan(job),
        simulation.run.metrics()[-1],
        (simulation.run.first_arrays(), simulation.run.newest().state.arrays),
    )
    small = plan.devices[0].clients
    assert line["ranks"] == {"2": small, "3": 6 - small} and line["units"] == {
        "block.0": 6 - small,
        "block.1": 6,
        "head": 6,
    }
    assert line["total_bytes"] == 3 * plan.round_bytes + 6 * plan.frame_bytes
    assert all(
        np.array_equal(start[t.name], end[t.name]) == (t.rank == 4) for t in simulation.setup.schema.tensors
    )
    assert plan.notes[-1].startswith(
        "ranks: no class has adapter.rank = 4, so in a simulation what lies beyond rank 3 stays as it starts"
    )
    assert not any(note.startswith("ranks") for note in make_plan(tiny_job(CLASSES)).notes)


def test_the_summary_page_and_terminal_say_it(told, tiny_settings):
    simulation, summary, plan = told
    lines = simulation.run.metrics()[1:]
    assert summary["ranks"] == [
        {
            "rank": rank,
            "numbers": d.numbers,
            "rounds": 3,
            "updates": sum(line["ranks"][str(rank)] for line in lines),
        }
        for rank, d in zip((2, 4), plan.devices)
    ]
    assert (
        check(json.loads(json.dumps(summary))) == summary
        and len(summary["baselines"]["local"]["clients"]) == 6
    )
    html = simulation.run.page.read_text()
    assert (
        html == page.render(summary)
        and 'id="ranks"' in html
        and facts.ranks(summary) in html
        and "up to " in facts.headline(summary)
    )
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    terminal.show(summary, console)
    assert (
        "numbers of a client" in console.file.getvalue()
        and max(len(line) for line in console.file.getvalue().splitlines()) <= 80
    )
    settings = [part for value in (*tiny_settings, CLASSES) for part in ("--set", value)]
    done = CliRunner().invoke(app, ["plan", *settings])
    assert (
        done.exit_code == 0 and "rank 4 (clients: 2, 4)" in done.stdout and "numbers trained" in done.stdout
    )
    found = json.loads(CliRunner().invoke(app, ["plan", "--json", *settings]).stdout)
    assert found["ranks"] == [2, 4] and [d["rank"] for d in found["devices"]] == [2, 4]
    assert [d["memory"] for d in found["devices"]] == [
        simulation.setup.step_memory(Limits(rank=rank)) for rank in (2, 4)
    ]
    assert found["devices"][1]["memory"] == found["device"]["total"]


def test_the_largest_update_is_one_that_a_class_sends(tiny_job):
    """And not one of the highest rank with the most blocks, which here nobody has."""
    classes = 'simulation.devices=[{name = "flat", rank = 1, units = 2}, {name = "high", units = 1}]'
    job = tiny_job("units.strategy=top", "units.budget=1", classes)
    setup, plan = open_setup(job), make_plan(job)
    bundle = SimpleNamespace(
        job=job, manifest=SimpleNamespace(spec=setup.spec), schema=setup.schema, frame_bytes=0
    )
    assert (
        communication(bundle, Traffic())["update_bytes"]
        == max(d.update_bytes for d in plan.devices)
        < packet_bytes(setup.schema)[1]
    )


def test_a_run_of_one_rank_says_nothing_of_it(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(
        tiny_job("federation.rounds=1", 'simulation.devices=[{name = "a", rank = 4}, {name = "b"}]'),
        tmp_path / "run",
    )
    finish(simulation)
    summary = load_summary(simulation.run.path)
    assert (
        "ranks" not in summary
        and "ranks" not in simulation.run.metrics()[-1]
        and 'id="ranks"' not in page.render(summary)
        and facts.ranks(summary) == ""
    )
    assert (
        simulation.setup.schema == simulation.setup.spec.schema
        and make_plan(simulation.setup.job).ranks == ()
    )


def test_an_audit_is_not_available_yet(tiny_job):
    private = (
        "privacy.unit=example",
        "privacy.noise-multiplier=2.0",
        "privacy.clip=0.5",
        "privacy.examples=20",
        "federation.weighting=equal",
    )
    with pytest.raises(
        UserError,
        match=r"simulation\.devices: ranks below adapter\.rank = 4 are not available yet for an audit",
    ):
        audit(tiny_job(CLASSES, *private))
