"""Runs whose clients keep something, whatever the method: engines, refusals, resuming, what reports say."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load

from fedtune.errors import JobError, RunError
from fedtune.job import parse_job
from fedtune.report import compare, facts, page, plots, terminal
from fedtune.report.format import ABSENT, number
from fedtune.report.summary import check, load_summary
from fedtune.runs.folder import open_run
from fedtune.training.worker import Worker
from fedtune.workflows.finish import finish
from fedtune.workflows.fleet import make_fleet
from fedtune.workflows.plan import make_plan
from fedtune.workflows.setup import open_setup
from fedtune.workflows.simulate import Simulation

SGD = ("federation.optimizer=sgd", "federation.lr=0.2")
METHODS = {
    "ditto": ("personal.method=ditto", "federation.server-optimizer=fedavgm", "federation.proximal=0.1"),
    "head": ("personal.method=head", "federation.aggregation=median", "federation.cohort=3"),
    "loge": (
        "personal.method=loge",
        "federation.server-optimizer=fedavgm",
        "federation.weight-decay=0.1",
        "federation.head-lr=0.01",
        "federation.proximal=0.1",
    ),
    "select": (
        "personal.method=select",
        "personal.every=1",
        "personal.share=0.4",
        "federation.cohort=4",
        "federation.weight-decay=0.1",
        "federation.proximal=0.1",
    ),
    "scaffold": ("federation.drift=scaffold", "federation.weighting=equal", *SGD),
    "fedspeed": ("federation.drift=fedspeed", "federation.proximal=0.1", *SGD),
}


def everything(simulation):
    folder = simulation.run.path
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in [*folder.glob("clients/**/*.safetensors"), sorted(folder.glob("checkpoints/*"))[-1]]
    }


@pytest.mark.parametrize("method", METHODS)
def test_engines_agree_and_a_resumed_run_is_the_same(method, tiny_job, run_rounds, tmp_path, monkeypatch):
    serial = run_rounds(tiny_job(*METHODS[method], "simulation.engine=serial"), tmp_path / "serial")
    monkeypatch.setattr(Worker, "handle", None)  # all together
    together = run_rounds(tiny_job(*METHODS[method]), tmp_path / "together")
    before, others = everything(together), everything(serial)
    assert len(before) > 3 and before.keys() == others.keys()
    for name, content in before.items():
        found, expected = load(content), load(others[name])
        assert found.keys() == expected.keys()
        for tensor, array in expected.items():
            np.testing.assert_allclose(found[tensor], array, rtol=0, atol=2e-5, err_msg=f"{name} {tensor}")
    for ours, theirs in zip(together.run.metrics(), serial.run.metrics(), strict=True):
        assert (
            ours.keys() == theirs.keys()
            and not ours["refused"]
            and ours.get("personal_clients") == theirs.get("personal_clients")
        )
        assert all(
            ours[key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value)
            for key, value in theirs.items()
            if key != "seconds"
        )
    assert ("personal_accuracy" in ours) == (
        method in ("ditto", "head", "loge", "select")
    ) and serial.run.newest().counters == together.run.newest().counters
    sorted((together.run.path / "checkpoints").glob("round-*"))[-1].unlink()
    Simulation(together.setup, together.run).rounds()
    assert everything(together) == before


@pytest.mark.parametrize(
    "changes, block",
    [
        (
            (
                "personal.method=ditto",
                "federation.optimizer=sgd",
                "federation.momentum=0.9",
                "federation.head-lr=0.01",
            ),
            3,
        ),
        (METHODS["fedspeed"], 2),
        (METHODS["select"], 3),
        (METHODS["loge"], 2),
    ],
    ids=["ditto", "fedspeed", "select", "loge"],
)
def test_blocks_and_uneven_clients_change_nothing(changes, block, tiny_job, run_rounds, tmp_path):
    """Clients of very different sizes, the longest-training first in a block."""
    uneven = (
        "data.alpha=0.7",
        "federation.rounds=2",
        "federation.batch-size=4",
        "federation.weight-decay=0.01",
        *changes,
        "federation.cohort=4",
    )
    runs = [
        run_rounds(tiny_job(*uneven, *more), tmp_path / more[0].replace("=", "-"))
        for more in (("simulation.engine=serial",), (f"simulation.block={block}",))
    ]
    serial, together = map(everything, runs)
    assert serial.keys() == together.keys()
    for name, content in serial.items():
        for tensor, array in load(content).items():
            np.testing.assert_allclose(
                load(together[name])[tensor], array, rtol=0, atol=3e-5, err_msg=f"{name} {tensor}"
            )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ("personal.method=head", "adapter.method=head"),
            r'adapter\.method = "head": with personal\.method = "head" nothing would be left to send',
        ),
        (
            ("personal.method=head", "adapter.train-head=false"),
            (
                r'adapter\.train-head = false: personal\.method = "head" is a head that each '
                r"client trains; set it to true"
            ),
        ),
        (
            ("personal.method=head", "model.task=causal-lm"),
            r'personal\.method = "head": a causal-lm has no task head; use "ditto"',
        ),
        (
            ("personal.strength=2.0",),
            r'personal\.strength = 2\.0: only for method = "ditto", not "none"; remove it',
        ),
        (
            ("personal.method=ditto", "units.strategy=top", "units.budget=1"),
            (
                r'personal\.method = "ditto": what a client keeps is of all that is trained, '
                r'and units\.strategy = "top" trains a part; use "all"'
            ),
        ),
        (
            (
                "personal.method=ditto",
                "privacy.unit=example",
                "privacy.epsilon=3.0",
                "privacy.clip=1.0",
                "privacy.examples=50",
                "federation.weighting=equal",
            ),
            r'made without noise, so no epsilon covers it; set privacy\.unit = "none"',
        ),
        (
            (
                "personal.method=ditto",
                "privacy.secure-aggregation=true",
                "privacy.clip=1.0",
                "federation.weighting=equal",
            ),
            r"was not tried under secure-aggregation, .*; set privacy\.secure-aggregation = false",
        ),
        (
            ("personal.method=ditto", "edge.mode=forward", *SGD),
            r'personal\.method = "ditto": needs gradients in every step; use edge\.mode = "backward"',
        ),
        (
            ("federation.drift=scaffold", "federation.weighting=equal"),
            (
                r'federation\.drift = "scaffold": is made for plain SGD, and optimizer = "adamw", '
                r'momentum = 0\.0; set federation\.optimizer = "sgd" and momentum = 0'
            ),
        ),
        (
            ("federation.drift=scaffold", *SGD, "federation.momentum=0.5", "federation.weighting=equal"),
            r'optimizer = "sgd", momentum = 0\.5; set',
        ),
        (
            ("federation.drift=scaffold", *SGD),
            (
                r'federation\.weighting = "examples": SCAFFOLD\'s controls count all '
                r'clients alike; set it to "equal"'
            ),
        ),
        (
            ("federation.drift=scaffold", *SGD, "federation.weighting=equal", "federation.proximal=0.1"),
            r"federation\.proximal = 0\.1: SCAFFOLD reads",
        ),
        (
            (
                "federation.drift=scaffold",
                *SGD,
                "federation.weighting=equal",
                "federation.server-optimizer=fedavgm",
            ),
            (
                r'the coordinator takes the mean, and server-optimizer = "fedavgm", aggregation = "mean"; '
                r'set them to "average" and "mean"'
            ),
        ),
        (
            ("federation.drift=fedspeed", *SGD, "federation.proximal=0.1", "federation.aggregation=median"),
            r'server-optimizer = "average", aggregation = "median"',
        ),
        (
            ("federation.drift=fedspeed", *SGD),
            r'federation\.proximal = 0: drift = "fedspeed" needs the strength of its pull',
        ),
        (
            ("federation.drift=fedspeed", *SGD, "federation.proximal=0.1", "personal.method=ditto"),
            r'is not known to work with personal\.method = "ditto"; set one of the two to "none"',
        ),
        (
            ("personal.method=ditto", "personal.strength=30.0", *SGD, "federation.lr=0.1"),
            (
                r"personal\.strength = 30: times the learning rate 0\.1 it is 3, and from 2 on each step "
                r"of SGD lands further away; lower one of the two"
            ),
        ),
        (
            ("federation.proximal=25.0", *SGD, "federation.lr=0.1"),
            r"federation\.proximal = 25: times the learning rate 0\.1 it is 2\.5",
        ),
        (
            ("personal.method=loge", "adapter.method=head"),
            (
                r'adapter\.method = "head": with personal\.method = "loge" nothing would be left '
                r"to learn against the fixed head"
            ),
        ),
        (
            ("personal.method=loge", "adapter.train-head=false"),
            (
                r'adapter\.train-head = false: personal\.method = "loge" is a head that each '
                r"client trains; set it to true"
            ),
        ),
        (
            ("personal.method=loge", "model.task=causal-lm"),
            r'personal\.method = "loge": a causal-lm has no task head; use "ditto"',
        ),
        (
            ("personal.method=select", "federation.server-optimizer=fedavgm"),
            (
                r'personal\.method = "select": the coordinator takes the mean of each entry .*, '
                r'and server-optimizer = "fedavgm", aggregation = "mean"; set them to "average" and "mean"'
            ),
        ),
        (
            ("personal.method=select", "federation.aggregation=median"),
            r'and server-optimizer = "average", aggregation = "median"; set',
        ),
        (
            ("personal.method=select", "adapter.method=bias", "adapter.train-head=false"),
            (
                r'adapter\.method = "bias": personal\.method = "select" leaves biases to all, .*; '
                r'choose another adapter, or "ditto"'
            ),
        ),
        (
            ("personal.method=select", "units.strategy=top", "units.budget=1"),
            r'personal\.method = "select": what a client keeps is of all that is trained',
        ),
        (("personal.method=select", "personal.most=0"), r"personal\.most = 0: must be greater than 0"),
        (
            ("personal.method=ditto", "personal.most=0.5"),
            r'personal\.most = 0\.5: only for method = "select", not "ditto"; remove it',
        ),
        (
            ("federation.ascent=0.2",),
            r'federation\.ascent = 0\.2: only for drift = "fedspeed", not "none"; remove it',
        ),
    ],
)
def test_what_does_not_work_is_refused(changes, message):
    with pytest.raises(JobError, match=message) as e:
        parse_job("", changes)
    assert len(e.value.problems) == 1


def test_only_clients_that_took_part_are_written_and_a_sample_is_enough(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(
        tiny_job(
            "personal.method=ditto", "federation.cohort=1", "federation.rounds=2", "evaluation.max-examples=9"
        ),
        tmp_path / "run",
    )
    met = {name for line in simulation.run.metrics() for name in line["clients"]}
    assert (
        set(simulation.kept.clients(simulation.setup.split.clients, 2)) == met
        and len(list(simulation.run.clients.glob("*/*"))) == len(met) <= 2
    )
    held = sum(
        len(simulation.setup.split.held_out[simulation.setup.split.clients.place(name)]) for name in met
    )
    assert (
        simulation.run.metrics()[-1]["personal_evaluated"] == held
        and simulation.run.metrics()[1]["personal_evaluated"] <= 9
    )
    found = [
        (place, index.tolist(), scores.count.tolist())
        for place, index, scores in simulation.personal_scores(2, simulation.run.newest().state.arrays)
    ]
    assert all(
        index == list(range(*simulation.setup.split.held_out.offsets[place : place + 2]))
        and len(count) == len(index)
        for place, index, count in found
    )


def test_a_language_model_of_its_own(tiny_llama, tiny_job, run_rounds, tmp_path):
    changes = (
        f"model.source={tiny_llama}",
        "model.task=causal-lm",
        "personal.method=ditto",
        "federation.rounds=2",
    )
    runs = [
        run_rounds(tiny_job(*changes, f"simulation.engine={engine}"), tmp_path / engine)
        for engine in ("serial", "vectorised")
    ]
    serial, together = map(everything, runs)
    assert serial.keys() == together.keys() and runs[0].run.metrics()[-1][
        "personal_accuracy"
    ] == pytest.approx(runs[1].run.metrics()[-1]["personal_accuracy"], abs=1e-3)
    for name, content in serial.items():
        for tensor, array in load(content).items():
            np.testing.assert_allclose(
                load(together[name])[tensor], array, rtol=0, atol=1e-4, err_msg=f"{name} {tensor}"
            )


@pytest.mark.parametrize(
    "method, times", [("ditto", 2), ("head", 1), ("select", 2), ("loge", 3), ("scaffold", 1), ("fedspeed", 2)]
)
def test_simulated_time_counts_every_gradient(method, times, tiny_job):
    phones = 'simulation.devices=[{name = "phone", speed = 4}]'
    (plain,), (ours,) = (make_plan(tiny_job(phones, *changes)).devices for changes in ((), METHODS[method]))
    assert ours.train == times * plain.train > 0
    setup = open_setup(tiny_job(phones, *METHODS[method]))
    name = setup.split.clients[0]
    assert make_fleet(setup)._turn(name, 100, 1, 100, 1.0).seconds == times * len(setup.split.train[0]) / 4


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_says_what_clients_keep_on_disk(method, tiny_job, run_rounds, tmp_path):
    """Every client in every round: then nothing is left to chance but how long a name is, and after three
    rounds each has all the versions it ever has.
    """
    job = tiny_job(*METHODS[method], "federation.cohort=6", "federation.rounds=4")
    run, plan = run_rounds(job, tmp_path / "run").run, make_plan(job)
    found = [path.stat().st_size for path in run.clients.rglob("*.safetensors")]
    assert (
        len(found) == 6 * 3
        and sum(found) == pytest.approx(plan.kept_total, abs=16 * len(found))
        and plan.kept_total == 6 * plan.kept_bytes
    )
    assert (
        make_plan(tiny_job(*METHODS[method], "federation.rounds=1")).kept_bytes == plan.kept_bytes / 3
        and make_plan(tiny_job()).kept_bytes == 0
    )


def test_a_run_does_not_go_on_without_what_its_clients_kept(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(tiny_job("personal.method=head"), tmp_path / "run")
    sorted((simulation.run.path / "checkpoints").glob("round-*"))[-1].unlink()
    shutil.rmtree(simulation.run.clients)
    with pytest.raises(
        RunError, match=r"clients: what clients keep is missing; restore it or begin a new run$"
    ):
        Simulation(simulation.setup, simulation.run).rounds()


def test_a_damaged_file_ends_the_run_with_a_line(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(tiny_job("personal.method=ditto", "federation.rounds=1"), tmp_path / "run")
    path = sorted(simulation.run.clients.rglob("*.safetensors"))[0]
    path.write_bytes(b"no")
    with pytest.raises(RunError, match="not what a client of this job keeps"):
        finish(simulation)


@pytest.mark.parametrize("engine", ["serial", "vectorised"])
def test_a_damaged_file_ends_the_rounds_on_any_engine(engine, tiny_job, run_rounds, tmp_path):
    """Nobody reads what scaffold keeps at the end, so a client that could not go on
    must not be passed over.
    """
    job = tiny_job(
        *SGD,
        "federation.drift=scaffold",
        "federation.weighting=equal",
        "federation.cohort=6",
        f"simulation.engine={engine}",
    )
    simulation = run_rounds(job, tmp_path / "run")
    newest = max((simulation.run.path / "checkpoints").iterdir())
    shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
    sorted(simulation.run.clients.rglob("00002.safetensors"))[0].write_bytes(b"no")
    with pytest.raises(
        RunError, match=r"not what a client of this job keeps .* restore it, or remove its folder"
    ):
        Simulation(simulation.setup, simulation.run).rounds()


@pytest.fixture(scope="module")
def folders(tiny_job, run_rounds, tmp_path_factory):
    """Finished runs by personal.method."""
    found = {method: tmp_path_factory.mktemp(method) / "run" for method in ("ditto", "head", "none")}
    for method, folder in found.items():
        finish(
            run_rounds(
                tiny_job(
                    f"personal.method={method}",
                    "federation.rounds=2",
                    "report.html=true",
                    'evaluation.baselines=["local"]',
                ),
                folder,
            )
        )
    return found


@pytest.fixture(scope="module")
def told(folders):
    return {method: load_summary(folder) for method, folder in folders.items()}


def test_reports_say_personal_accuracy_beside_the_global(told, folders):
    for method in ("ditto", "head"):
        s = told[method]
        own, line = s["personal"], s["rounds"][-1]
        assert (own["accuracy"], own["clients"], own["examples"], own["of"]) == (
            line["personal_accuracy"],
            line["personal_clients"],
            line["personal_evaluated"],
            6,
        )
        assert own["accuracy"] != own["federated"] or method == "ditto"
        sentence = facts.personal(s)
        assert re.search(
            rf"held-out examples of the {own['clients']} of 6 clients that took part, worst tenth [\d.]+; "
            r"the global model has [\d.]+ on the same examples\.$",
            sentence,
        )
        html = page.render(s)
        assert (
            sentence in html.replace("&#x27;", "'")
            and 'id="personal"' in html
            and "personal accuracy" in html
        )
        console = Console(file=io.StringIO(), width=80, force_terminal=False)
        terminal.show(s, console)
        shown = console.file.getvalue()
        assert (
            "What clients keep" in shown
            and re.search(r"accuracy\s+personal\s+on", shown)
            and number(line["personal_accuracy"]) in shown
        )
        assert check(json.loads(json.dumps(s))) == s
    cards = {method: (run / "README.md").read_text() for method, run in folders.items()}
    assert ["accuracy of what clients keep" in cards[m] for m in ("ditto", "head", "none")] == [
        True,
        True,
        False,
    ] and ["which nobody trained" in card for card in cards.values()] == [False, True, False]
    assert any("initial head" in line for line in facts.notices(told["head"])) and not any(
        "initial head" in line for line in facts.notices(told["ditto"])
    )
    assert facts.personal(told["none"]) == "" and 'id="personal"' not in page.render(told["none"])


def test_labels_are_told_apart(told, folders, tiny_job):
    """Accuracies of labels, weighted by their examples, are those of the run; what each client predicts
    with is counted over its own.
    """
    for method, s in told.items():
        rows = {row["label"]: row for row in s["by_label"]}
        assert rows.keys() == set(s["labels"]) and [row["train"] for row in s["by_label"]] == sorted(
            (row["train"] for row in rows.values()), reverse=True
        )
        assert sum(row["train"] for row in rows.values()) == sum(c["train"] for c in s["split"])
        assert sum(row["accuracy"] * row["examples"] for row in rows.values()) == pytest.approx(
            s["final"]["accuracy"] * s["rounds"][-1]["evaluated"]
        )
        setup = open_setup(tiny_job(f"personal.method={method}", "federation.rounds=2"))
        held_out = setup.dataset.examples.labels[setup.split.held_out.rows]
        simulation = Simulation(setup, open_run(folders[method]))
        right = simulation.scores(simulation.run.newest().state.arrays).correct
        for place, label in enumerate(setup.dataset.label_names):
            assert rows[label]["accuracy"] == pytest.approx(right[held_out == place].mean())
        assert all(("personal" in row) == (method != "none") for row in rows.values())
        console = Console(file=io.StringIO(), width=100, force_terminal=False)
        terminal.show(s, console)
        assert "Labels" in console.file.getvalue() and 'id="labels"' in page.render(s)
    own = [row for row in told["ditto"]["by_label"] if row["personal"] is not None]
    assert len(own) == 2 and min(row["personal"] for row in own) <= told["ditto"]["personal"][
        "accuracy"
    ] <= max(row["personal"] for row in own)


def test_compare_has_a_column(told):
    three = list(told.values())
    assert (
        compare.header(three)[-1] == "personal accuracy" and compare.header([told["none"]]) == compare.HEADER
    )
    ditto, head, none = (row[-1] for row in compare.rows(three))
    assert ditto.endswith("clients") and head.endswith("clients") and not none.endswith("clients")
    assert "personal accuracy" in compare.render(three)


def test_where_heads_stay_with_the_clients_their_accuracy_comes_first(told):
    head, own = told["head"], told["head"]["personal"]
    assert facts.headline(head).startswith(
        f"{number(own['accuracy'])} personal accuracy, of each client with the head that it keeps"
    )
    first, worst, shared = facts.key_figures(head)[:3]
    assert (first.name, first.value, worst.value) == (
        "personal accuracy",
        number(own["accuracy"]),
        number(own["worst_tenth"]),
    ) and f"{own['clients']} of 6 clients" in first.note
    assert shared.name == "shared model, held-out accuracy" and "nobody trained" in shared.note
    assert page.render(head).index("personal accuracy") < page.render(head).index("shared model")
    for plot in plots.learning(head):
        assert "accuracy" not in plot.key or [key.name for key in plot.legend[:2]] == [
            "personal",
            "federated, initial head",
        ]
    rows = {
        s["job"]["personal"]["method"]: row
        for s, row in zip(told.values(), compare.rows(list(told.values())))
    }
    assert (
        rows["head"][1] == f"{number(own['accuracy'])} personal"
        and rows["head"][2] == number(own["worst_tenth"])
        and rows["head"][3] == number(head["rounds"][-1]["personal_loss"])
    )
    assert (
        rows["ditto"][1:3]
        == (
            f"{number(told['ditto']['personal']['accuracy'])} personal",
            number(told["ditto"]["personal"]["worst_tenth"]),
        )
        and "personal" not in rows["none"][1]
    )
    assert compare.rows([told["ditto"], told["none"]])[0][1] == number(
        told["ditto"]["final"]["accuracy"]
    ) and "personal" not in facts.headline(told["ditto"])
    assert (
        any(
            line.startswith("Beside a run whose clients keep their heads")
            for line in compare.cautions(list(told.values()))
        )
        and compare.cautions([head, head]) == []
    )
    better = head | {"personal": own | {"accuracy": 0.999}}
    assert "0.999 personal" in compare.headline([told["none"], better])
    unfinished = {key: value for key, value in head.items() if key not in ("personal", "final")} | {
        "complete": False
    }
    assert facts.leading(unfinished)[0] == head["rounds"][-1][
        "personal_accuracy"
    ] and "personal accuracy" in facts.headline(unfinished)
    never = unfinished | {
        "rounds": [{k: v for k, v in r.items() if not k.startswith("personal")} for r in head["rounds"]]
    }
    assert (
        facts.headline(never).startswith("Nothing evaluated yet")
        and compare.rows([never])[0][1] == ABSENT == facts.key_figures(never)[0].value
    )


def test_clients_alone_train_the_whole_model(told):
    """That baseline knows no rounds and keeps nothing: it is the same for whatever travels."""
    alone = [
        [(c["name"], c["accuracy"]) for c in told[method]["baselines"]["local"]["clients"]] for method in told
    ]
    assert alone[0] == alone[1] == alone[2] and np.isfinite([a for _, a in alone[0]]).all()
