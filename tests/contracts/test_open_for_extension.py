"""What a caller brings from Python, made here and nowhere in fedtune:
it runs on both engines with equal results.
"""

import csv
import json

import numpy as np
import pytest

import fedtune
from fedtune.errors import JobError, RunError, UserError

SHORT = ("federation.rounds=2", "report.html=true", "export.onnx=false", "export.peft=false")


def middle(updates, model):
    """A rule: the mean of what lies between the smallest and the largest of each number."""
    return {
        name: np.sort(np.stack([u.arrays[name] for u in updates]), 0)[1:-1].mean(0, dtype=np.float32)
        if len(updates) > 2
        else updates[0].arrays[name]
        for name in model
    }


def by_size(clients, round, rng):
    """A selection: the three clients with most examples, and one by lot."""
    first = sorted(clients, key=lambda c: (-c.examples, c.name))
    return [*first[:3], first[3 + int(rng.integers(len(first) - 3))].name]


def test_an_own_rule_and_selection_are_the_same_on_both_engines(tiny_job, tmp_path):
    runs, lines = {}, []
    for engine in ("vectorised", "serial"):
        job = tiny_job(*SHORT, "data.clients=6", "data.partition=iid", f"simulation.engine={engine}")
        runs[engine] = fedtune.simulate(
            job, out=tmp_path / engine, aggregation=middle, select=by_size, on_round=lines.append
        )
    one, two = runs.values()
    assert [line["round"] for line in lines] == [0, 1, 2] * 2
    assert [line["clients"] for line in one.rounds] == [line["clients"] for line in two.rounds]
    assert all(len(line["clients"]) == 4 for line in one.rounds[1:])
    ours, theirs = (run.folder.newest().state.arrays for run in (one, two))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    began = json.loads((tmp_path / "serial" / "run.json").read_text())
    assert began["own"] == {"aggregation": "middle", "select": "by_size"}


def test_a_rule_of_ones_own_that_is_the_mean_gives_the_built_in_run(tiny_job, tmp_path):
    def mean(updates, model):
        total = sum(u.weight for u in updates)
        return {
            name: (sum(u.weight * u.arrays[name].astype(np.float64) for u in updates) / total).astype(
                np.float32
            )
            for name in model
        }

    own = fedtune.simulate(tiny_job(*SHORT), out=tmp_path / "own", aggregation=mean)
    built_in = fedtune.simulate(tiny_job(*SHORT), out=tmp_path / "built-in")
    for name, array in built_in.folder.newest().state.arrays.items():
        np.testing.assert_allclose(own.folder.newest().state.arrays[name], array, rtol=1e-6, atol=1e-7)


def test_what_a_run_gives(tiny_job, tmp_path):
    run = fedtune.simulate(tiny_job(*SHORT, "adapter.method=lora"), out=tmp_path / "run")
    again = fedtune.open_run(str(tmp_path / "run"))
    texts = ["a bright and lovely film", "the meal was awful", "so"]
    assert again.rounds == run.rounds and again.summary == run.summary and run.report().is_file()
    assert again.predict(texts) == run.predict(texts) and set(run.predict(texts)) <= set(
        run.summary["labels"]
    )
    assert run.predict([]) == []
    probabilities = run.scores(texts)
    assert probabilities.shape == (3, 2) and np.allclose(probabilities.sum(1), 1, atol=1e-6)
    assert [run.summary["labels"][i] for i in probabilities.argmax(1)] == run.predict(texts, batch_size=1)
    model = run.model()
    assert not model.training and model is not run.model()
    data = fedtune.load_job(tmp_path / "run" / "job.toml").data.source
    with open(data, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    right = np.mean([a == row["label"] for a, row in zip(run.predict(row["text"] for row in rows), rows)])
    assert abs(right - run.rounds[-1]["accuracy"]) < 0.2  # of the held-out rows alone


def test_a_finished_run_is_given_back_and_an_unfinished_one_goes_on(tiny_job, tmp_path):
    job, seen = tiny_job(*SHORT), list[int]()

    class Stop(Exception):
        pass

    def stop(line):
        seen.append(line["round"])
        if line["round"] == 1:
            raise Stop

    with pytest.raises(Stop):
        fedtune.simulate(job, out=tmp_path / "run", on_round=stop)
    run = fedtune.simulate(job, out=tmp_path / "run", on_round=lambda line: seen.append(line["round"]))
    assert seen == [0, 1, 2] and len(run.rounds) == 3
    whole = fedtune.simulate(job, out=tmp_path / "whole")
    same = (r.folder.newest().state.arrays for r in (run, whole))
    assert all(np.array_equal(a, b) for a, b in zip(*(arrays.values() for arrays in same)))
    before = (run.path / "summary.json").stat().st_mtime_ns
    fedtune.simulate(job, out=tmp_path / "run", on_round=lambda line: seen.append(line["round"]))
    assert seen == [0, 1, 2] and (run.path / "summary.json").stat().st_mtime_ns == before


def test_a_job_may_be_a_mapping_or_a_file(tiny_job, tmp_path):
    from fedtune.job import to_toml
    from fedtune.workflows.python import job_of

    job = tiny_job()
    (tmp_path / "job.toml").write_text(to_toml(job))
    assert job_of(tmp_path / "job.toml") == job == job_of(str(tmp_path / "job.toml"))
    assert job_of({"federation": {"rounds": 3, "local_epochs": 2}}).federation.local_epochs == 2
    assert job_of({"data": {"labels": ["a", "b"]}}).data.labels == ("a", "b")
    assert job_of(None) == fedtune.Job()
    with pytest.raises(JobError, match=r"federation\.rounds = 0"):
        job_of({"federation": {"rounds": 0}})
    with pytest.raises(
        UserError, match=r"job: is a int; give a path, a mapping of sections, or a fedtune\.Job"
    ):
        job_of(3)


def nan(updates, model):
    return {name: a * np.nan for name, a in model.items()}


def short(updates, model):
    return {name: a.ravel()[:1] for name, a in model.items()}


def strange(updates, model):
    return {"else": np.zeros(1, np.float32)}


def lost(updates, model):
    return 3


def fails(*given):
    raise ValueError("no\nsuch thing")


@pytest.mark.parametrize(
    "own, words",
    [
        ({"aggregation": nan}, r"aggregation nan: gives a number that is not finite for \S+; it should give"),
        ({"aggregation": short}, r"aggregation short: gives \[1\] for \S+; it should give an array \["),
        ({"aggregation": strange}, "aggregation strange: gives 'else', which is no tensor of the model"),
        ({"aggregation": lost}, "aggregation lost: gives a int; it should give arrays by the names"),
        ({"aggregation": fails}, r"aggregation fails: fails on 3 updates \(ValueError: no such thing\)"),
        ({"aggregation": 3}, "aggregation: is a int; give a function"),
        ({"select": lambda c, r, g: ["nobody"]}, "gives 'nobody' in round 1, which is no client"),
        ({"select": lambda c, r, g: [c[0], c[0]]}, "gives a client twice in round 1"),
        ({"select": fails}, r"select fails: fails in round 1 \(ValueError: no such thing\)"),
        ({"select": "all"}, "select: is a str; give a function"),
    ],
)
def test_an_object_that_breaks_its_promise_is_named_before_anything_is_written(
    own, words, tiny_job, tmp_path
):
    with pytest.raises(UserError, match=words) as caught:
        fedtune.simulate(tiny_job(*SHORT), out=tmp_path / "run", **own)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["vectorised", "serial"])
def test_an_object_that_breaks_its_promise_later_leaves_the_last_whole_round(engine, tiny_job, tmp_path):
    def sometimes(clients, round, rng):
        return clients[:2] if round == 1 else [None]

    with pytest.raises(UserError, match=r"select sometimes: gives None in round 2"):
        fedtune.simulate(
            tiny_job(*SHORT, f"simulation.engine={engine}"), out=tmp_path / "run", select=sometimes
        )
    assert len(fedtune.open_run(tmp_path / "run").rounds) == 2


def test_a_run_is_not_gone_on_with_without_its_objects(tiny_job, tmp_path):
    from typer.testing import CliRunner

    from fedtune.cli.main import app

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedtune.simulate(tiny_job(*SHORT), out=tmp_path / "run", aggregation=middle, on_round=stop)
    for resume in (
        lambda: fedtune.simulate(tiny_job(*SHORT), out=tmp_path / "run"),
        lambda: fedtune.simulate(tiny_job(*SHORT), out=tmp_path / "run", aggregation=middle, select=by_size),
    ):
        with pytest.raises(RunError, match=r"began with objects passed from Python \(aggregation = middle\)"):
            resume()
    result = CliRunner().invoke(app, ["simulate", "--resume", str(tmp_path / "run")])
    assert isinstance(result.exception, RunError | SystemExit)
    with pytest.raises(RunError, match="holds a run of another job"):
        fedtune.simulate(tiny_job(*SHORT, "adapter.rank=2"), out=tmp_path / "run", aggregation=middle)
    assert fedtune.simulate(tiny_job(*SHORT), out=tmp_path / "run", aggregation=middle).summary["complete"]


@pytest.mark.parametrize(
    "changes, own, words",
    [
        (
            (
                "privacy.unit=client",
                "privacy.clip=1.0",
                "privacy.noise-multiplier=1.0",
                "federation.weighting=equal",
            ),
            {"aggregation": middle},
            "sized for a mean",
        ),
        (
            (
                "privacy.unit=client",
                "privacy.clip=1.0",
                "privacy.noise-multiplier=1.0",
                "federation.weighting=equal",
            ),
            {"select": by_size},
            "counts on clients being drawn",
        ),
        (
            ("simulation.engine=ray",),
            {"aggregation": middle},
            "its processes cannot be given objects of Python",
        ),
    ],
)
def test_where_nobody_says_that_it_fits_it_is_refused(changes, own, words, tiny_job, tmp_path):
    with pytest.raises(UserError, match=words):
        fedtune.simulate(tiny_job(*SHORT, *changes), out=tmp_path / "run", **own)
    assert not (tmp_path / "run").exists()


def test_a_rule_is_tried_with_what_a_round_trains(tiny_job, tmp_path):
    def greedy(updates, model):
        return {
            "encoder.layer.0.attention.self.query.R": updates[0].arrays[
                "encoder.layer.0.attention.self.query.R"
            ]
        }

    lisa = tiny_job(*SHORT, "units.strategy=lisa", "units.budget=1", "federation.seed=1")
    with pytest.raises(UserError, match="aggregation greedy: fails on 3 updates"):
        for seed in range(6):  # one of them does not train the first block in round 1
            job = lisa.model_copy(update={"federation": lisa.federation.model_copy(update={"seed": seed})})
            from fedtune.round.algorithm import require_kept_promises
            from fedtune.workflows.python import _rule
            from fedtune.workflows.setup import open_setup

            setup = open_setup(job)
            require_kept_promises(setup.job, setup.schema, setup.store.clients, _rule(greedy), None)


def test_the_names_of_the_package():
    for name in fedtune.__all__:
        assert getattr(fedtune, name).__doc__, name
        assert name in dir(fedtune)
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        _ = fedtune.simulat
