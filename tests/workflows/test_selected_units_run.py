"""Whole runs on selected units: the plan's figures against the run's,
device classes by their own memory, and what reports say.
"""

import io
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fedtune.adapters.describe import describe
from fedtune.adapters.methods import attach
from fedtune.algorithms.units import selected, tensors_of
from fedtune.bundles.bundle import open_bundle
from fedtune.cli.main import app
from fedtune.errors import JobError, UserError
from fedtune.report import facts, page, terminal
from fedtune.report.summary import check, load_summary
from fedtune.runs.folder import open_run
from fedtune.simulation.devices import MB, assign
from fedtune.training.lean import Lean
from fedtune.training.local import only
from fedtune.training.together import kept_bytes
from fedtune.workflows.audit import audit
from fedtune.workflows.finish import finish
from fedtune.workflows.fleet import make_fleet
from fedtune.workflows.plan import make_plan
from fedtune.workflows.setup import data_free_frame, open_setup

TOP = ("units.strategy=top", "units.budget=1")
LISA = ("units.strategy=lisa", "units.budget=1")


@pytest.mark.parametrize(
    "changes",
    [
        TOP,
        ("units.strategy=bottom", "units.budget=1", "adapter.method=lora"),
        (*LISA, "federation.rounds=5"),
        ("units.strategy=both", "units.budget=2"),
        (*LISA, "adapter.init=gradient", "adapter.init-clients=3", "adapter.init-examples=8"),
    ],
    ids=" ".join,
)
def test_bytes_are_those_of_a_run(changes, tiny_job, run_rounds, tmp_path):
    job = tiny_job(*changes)
    plan, run = make_plan(job), run_rounds(job, tmp_path / "run").run
    met = {name for line in run.metrics() for name in line["clients"]}
    assert (
        run.metrics()[-1]["total_bytes"]
        == job.federation.rounds * plan.round_bytes + len(met) * plan.frame_bytes + plan.init_bytes
    )
    assert plan.round_bytes == 2 * (plan.model_bytes + plan.update_bytes)  # blocks of one size


def test_what_moves_is_what_was_drawn(tiny_job, run_rounds, tmp_path):
    job = tiny_job(*LISA, "federation.rounds=4")
    simulation = run_rounds(job, tmp_path / "run")
    schema, lines = simulation.setup.schema, simulation.run.metrics()
    assert {tuple(line["units"]) for line in lines[1:]} == {
        selected(job, schema, r) for r in range(1, 5)
    } and len({tuple(line["units"]) for line in lines}) == 3
    first, last = simulation.run.first_arrays(), simulation.run.newest().state.arrays
    assert all((first[n] != last[n]).any() for n in first)


@pytest.mark.parametrize(
    "changes",
    [
        TOP,
        ("units.strategy=bottom", "units.budget=1"),
        (*TOP, "adapter.method=lora"),
        (*TOP, "adapter.method=full"),
        (*TOP, "adapter.method=ffa-lora"),
        (*TOP, "adapter.init=gradient", "adapter.init-clients=3", "adapter.init-examples=8"),
        ("units.strategy=bottom", "units.budget=1", "adapter.method=bias", "simulation.engine=serial"),
    ],
    ids=" ".join,
)
def test_what_nobody_trains_is_left_out_and_changes_nothing(
    changes, tiny_job, run_rounds, tmp_path, monkeypatch
):
    """Beside a run in which all blocks have an adapter, and all of it comes down."""
    job = tiny_job(*changes)
    part = run_rounds(job, tmp_path / "part").run
    monkeypatch.setattr("fedtune.workflows.setup.spec_of", lambda layout, job: describe(layout, job.adapter))
    whole = run_rounds(job, tmp_path / "whole").run
    found, all_of_them = part.newest().state.arrays, whole.newest().state.arrays
    schema = open_bundle(part.bundle).schema
    rest = "block.0" if "units.strategy=top" in changes else "block.1"
    assert (
        schema.blocks == ("block.0", "block.1")
        and rest not in schema.units
        and found.keys() < all_of_them.keys()
    )
    for name, array in all_of_them.items():
        np.testing.assert_array_equal(array, found.get(name, whole.first_arrays()[name]))
    kept = [open_bundle(run.bundle) for run in (part, whole)]
    assert (
        all(f".{rest.removeprefix('block.')}." not in name for name in kept[0].frame)
        and kept[0].frame.keys() <= kept[1].frame.keys()
    )
    lines = [run.metrics()[-1] for run in (part, whole)]
    assert lines[0]["accuracy"] == lines[1]["accuracy"] and lines[0]["units"] == lines[1]["units"]
    assert lines[0]["total_bytes"] < lines[1]["total_bytes"]


def test_a_budget_of_all_blocks_is_all(tiny_job, run_rounds, tmp_path):
    plain, whole = (
        run_rounds(tiny_job(*changes), tmp_path / str(len(changes))).run
        for changes in ((), ("units.strategy=both", "units.budget=2"))
    )
    assert all(
        np.array_equal(a, whole.newest().state.arrays[n]) for n, a in plain.newest().state.arrays.items()
    )
    assert plain.newest().counters == whole.newest().counters and "units" not in plain.metrics()[-1]


@pytest.mark.parametrize("method", ["fed-sb", "lora", "full"])
def test_memory_is_less_the_higher_the_lowest_unit(method, tiny_job):
    plans = {
        s: make_plan(
            tiny_job(
                f"adapter.method={method}", *(() if s == "all" else (f"units.strategy={s}", "units.budget=1"))
            )
        )
        for s in ("all", "top", "bottom", "lisa")
    }
    top, bottom, lisa, all_ = (plans[s].device for s in ("top", "bottom", "lisa", "all"))
    assert (
        lisa["activations"] == bottom["activations"]
        and bottom["total"] <= lisa["total"]
        and bottom["activations"] <= all_["activations"]
        and bottom["total"] < all_["total"]
    )
    outside = any(u.name == "outside" for u in plans["top"].units)
    assert outside == (method == "full") == any(note.startswith("units: ") for note in plans["top"].notes)
    assert outside or top["activations"] < 0.7 * bottom["activations"]
    trained = sum(u.numbers for u in plans["top"].units if u.trained == "always")
    # values of all; gradients and two moments of these
    assert top["adapter_gradients_optimizer"] == 4 * (plans["top"].trainable + 3 * trained)
    assert plans["top"].update_bytes == pytest.approx(4 * trained, abs=600 if method == "fed-sb" else 1200)


@pytest.mark.parametrize("strategy", ["top", "bottom"])
@pytest.mark.parametrize("lean", ["off", "exact", "all"])
@pytest.mark.parametrize("method", ["fed-sb", "lora", "full"])
def test_planned_activations_are_those_that_a_step_keeps(method, lean, strategy, tiny_job):
    job = tiny_job(
        f"adapter.method={method}", f"units.strategy={strategy}", "units.budget=1", f"federation.lean={lean}"
    )
    setup = open_setup(job)
    model, schema = setup.fresh_model(), setup.schema
    parameters = attach(model, setup.spec, data_free_frame(setup, model))
    batch = {"input_ids": torch.full((8, 16), 5), "attention_mask": torch.ones(8, 16, dtype=torch.long)}
    around = Lean(model, lean == "exact").running() if lean != "off" else nullcontext()
    with only(parameters, tensors_of(schema, selected(job, schema, 1))), kept_bytes(model) as kept, around:
        model.loss(model(**batch), batch, torch.zeros(8, dtype=torch.long))[0].sum()
    assert make_plan(job).device["activations"] == pytest.approx(sum(kept.values()), rel=0.03)


def test_a_plan_says_who_trains_what(tiny_job, tiny_settings):
    units = {
        s: [
            (u.name, u.selectable, u.trained)
            for u in make_plan(tiny_job(f"units.strategy={s}", "units.budget=1")).units
        ]
        for s in ("top", "lisa")
    }
    assert units["top"] == [
        ("block.0", True, "never"),
        ("block.1", True, "always"),
        ("head", False, "always"),
    ]
    assert units["lisa"] == [
        ("block.0", True, "drawn"),
        ("block.1", True, "drawn"),
        ("head", False, "always"),
    ]
    done = CliRunner().invoke(
        app, ["plan", *(part for value in (*tiny_settings, *TOP) for part in ("--set", value))]
    )
    assert done.exit_code == 0 and "1 of 2 blocks" in done.stdout and "selectable" in done.stdout
    found = json.loads(
        CliRunner()
        .invoke(
            app, ["plan", "--json", *(part for value in (*tiny_settings, *TOP) for part in ("--set", value))]
        )
        .stdout
    )
    assert (found["strategy"], found["budget"], found["units"][0]["trained"]) == ("top", 1, "never")


def test_classes_are_checked_against_the_memory_of_their_own_budget(tiny_job):
    """A limit between the needs of one block and of two."""
    batch = "federation.batch-size=64"
    needs = [
        make_plan(tiny_job("units.strategy=top", f"units.budget={b}", batch)).device["total"] for b in (1, 2)
    ]
    limit = -(-needs[0] // MB)
    assert limit * MB < needs[1]
    classes = (
        f'simulation.devices=[{{name = "one", memory-mb = {limit}, units = 1}}, {{name = "two", '
        f'memory-mb = {limit}}}, {{name = "free"}}]'
    )
    job = tiny_job("units.strategy=top", "units.budget=2", batch, classes)
    plan, fleet = make_plan(job), make_fleet(open_setup(job))
    assert [d.able for d in plan.devices] == fleet.fit.tolist() == [True, False, True] and any(
        note.startswith("two: memory-mb") for note in plan.notes
    )
    assert plan.devices[0].up == plan.devices[2].up == 0.0  # no bandwidth given
    with pytest.raises(JobError, match=r"so none of the 6 clients can take part; give a class memory-mb = "):
        make_fleet(
            open_setup(
                tiny_job(
                    "units.strategy=bottom",
                    "units.budget=1",
                    batch,
                    f'simulation.devices=[{{name = "one", memory-mb = {limit}}}]',
                )
            )
        )


def test_classes_train_their_own_budgets(tiny_job, run_rounds, tmp_path):
    """Also what they send, and how long that takes, is their own."""
    classes = 'simulation.devices=[{name = "one", units = 1, up-kbps = 8}, {name = "two", up-kbps = 8}]'
    job = tiny_job(
        "units.strategy=top", "units.budget=2", classes, "federation.cohort=6", "federation.deadline=1000"
    )
    run = run_rounds(job, tmp_path / "run").run
    small = int((assign(0, job.simulation.devices, 6) == 0).sum())
    assert 0 < small < 6
    plan, line = make_plan(job), run.metrics()[-1]
    assert line["units"] == {"block.0": 6 - small, "block.1": 6, "head": 6}
    one, two = (line["devices"][name] for name in ("one", "two"))
    sizes = {name: found["up"] / found["used"] for name, found in (("one", one), ("two", two))}
    assert sizes["two"] == plan.update_bytes and 0 <= sizes["two"] - sizes["one"] - plan.units[0].bytes < 512
    assert one["seconds"] == pytest.approx(one["up"] / 1000, abs=1e-3) and two["seconds"] == pytest.approx(
        two["up"] / 1000, abs=1e-3
    )
    assert [d.up for d in plan.devices] == pytest.approx([sizes["one"] / 1000, sizes["two"] / 1000])
    mean = (small * (plan.model_bytes + sizes["one"]) + (6 - small) * (plan.model_bytes + sizes["two"])) / 6
    assert plan.round_bytes == pytest.approx(6 * mean, rel=0.01)


@pytest.fixture(scope="module")
def told(tiny_job, run_rounds, tmp_path_factory):
    """A finished run of four rounds on drawn units, with its summary."""
    simulation = run_rounds(
        tiny_job(*LISA, "federation.rounds=4", "report.html=true", 'evaluation.baselines=["local"]'),
        tmp_path_factory.mktemp("told") / "run",
    )
    finish(simulation)
    return simulation.run, load_summary(simulation.run.path)


def test_the_summary_says_how_often_each_unit_was_trained(told):
    run, summary = told
    lines = run.metrics()[1:]
    assert [u["name"] for u in summary["units"]] == ["block.0", "block.1", "head"]
    for u in summary["units"]:
        assert (
            u["rounds"] == sum(u["name"] in line["units"] for line in lines)
            and u["updates"] == 2 * u["rounds"]
        )
    assert summary["units"][0]["rounds"] + summary["units"][1]["rounds"] == summary["units"][2]["rounds"] == 4
    assert check(json.loads(json.dumps(summary))) == summary
    assert (
        summary["communication"]["update_bytes"] == make_plan(run.job()).update_bytes
        and summary["communication"]["up"] == 8 * summary["communication"]["update_bytes"]
    )


def test_page_and_terminal_show_it(told, tiny_job, run_rounds, tmp_path):
    run, summary = told
    html = run.page.read_text()
    assert html == page.render(summary) and 'id="units"' in html
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    terminal.show(summary, console)
    plain = console.file.getvalue()
    assert (
        "Trained units" in plain
        and "client updates" in plain
        and max(len(line) for line in plain.splitlines()) <= 80
    )
    for text in (facts.units(summary), "rounds trained", "what is trained or left alone as one"):
        assert text in html
    assert "up to " in facts.headline(
        summary
    ) and "Strategy lisa: a client trains 1 block in a round, and" in facts.units(summary)
    other = run_rounds(tiny_job("federation.rounds=1"), tmp_path / "other")
    finish(other)
    whole = load_summary(open_run(other.run.path).path)
    assert "units" not in whole and 'id="units"' not in page.render(whole) and facts.units(whole) == ""


def test_an_audit_takes_what_all_always_train(tiny_job):
    """What it finds is in test_audit_pipeline."""
    private = (
        "privacy.unit=example",
        "privacy.noise-multiplier=2.0",
        "privacy.clip=0.5",
        "privacy.examples=20",
        "federation.weighting=equal",
        "units.budget=1",
        "federation.rounds=1",
    )
    found = audit(tiny_job(*private, "units.strategy=top"), canaries=64)
    assert found.outcome.canaries == 64 and not [note for note in found.notes if "did not leave" in note]
    with pytest.raises(UserError, match=r'units\.strategy = "lisa": not available yet for an audit'):
        audit(tiny_job(*private, "units.strategy=lisa"))
