"""Run folders: never overwritten, and their parts as they were written."""

import json

import numpy as np
import pytest

from fedtune.algorithms import State
from fedtune.checkpoint import Checkpoint
from fedtune.errors import EnvironmentProblem, RunError
from fedtune.job import Job, parse_job
from fedtune.run import create_run, next_run_path, open_run


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path / "runs" / "one", parse_job("", ["federation.rounds=9"]), {"created": "now"})


def at(round):
    return Checkpoint(State(round, {"x": np.full(2, round, np.float32)}), {})


def rounds_on_disk(run):
    return sorted(int(p.stem[-5:]) for p in (run.path / "checkpoints").iterdir())


def test_the_job_is_kept_whole(run):
    again = open_run(run.path)
    assert again.job() == parse_job("", ["federation.rounds=9"]) and again.facts() == {"created": "now"}


def test_a_new_run_has_no_round(run):
    assert run.newest() is None and run.metrics() == []


def test_the_first_and_the_newest_two_checkpoints_are_kept(run):
    for round in range(6):
        run.save(at(round))
        assert run.newest().state.round == round
    assert rounds_on_disk(run) == [0, 4, 5] and run.first_arrays()["x"].tolist() == [0, 0]


def test_round_100000_comes_after_99999(run):
    for round in (0, 99_999, 100_000):
        run.save(at(round))
    assert run.newest().state.round == 100_000


def test_metrics_of_a_repeated_round_replace_it_and_what_came_after(run):
    for round, loss in [(0, 9.0), (1, 8.0), (2, 7.0), (1, 6.0)]:
        run.append_metrics({"round": round, "loss": loss})
    assert run.metrics() == [{"round": 0, "loss": 9.0}, {"round": 1, "loss": 6.0}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.append_metrics({"round": 2, "loss": float("nan")})
    assert len(run.metrics()) == 2


@pytest.mark.parametrize("make", [lambda p: p.write_text("a file"), lambda p: (p.mkdir(), (p / "mine.txt").write_text("keep"))], ids=["file", "folder"])
def test_nothing_is_ever_overwritten(make, tmp_path):
    make(tmp_path / "run")
    with pytest.raises(RunError, match="already exists and is not empty; choose another --out, or continue it with --resume"):
        create_run(tmp_path / "run", Job(), {})
    assert {p.name for p in tmp_path.rglob("*")} <= {"run", "mine.txt"}


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    assert create_run(tmp_path / "run", Job(), {}).job() == Job()


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*: Not a directory"):
        create_run(tmp_path / "file" / "run", Job(), {})


@pytest.mark.parametrize("missing", ["run.json", "job.toml"])
def test_a_folder_without_its_files_is_no_run(missing, run):
    (run.path / missing).unlink()
    with pytest.raises(RunError, match="not a run folder"):
        open_run(run.path)


def test_broken_facts_are_said(run):
    (run.path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json: cannot be read"):
        open_run(run.path).facts()


def test_numbers_of_runs_go_up(tmp_path):
    assert next_run_path(tmp_path, "fed-sb") == tmp_path / "fed-sb-001"
    (tmp_path / "fed-sb-001").mkdir()
    (tmp_path / "fed-sb-002").write_text(json.dumps({}))
    assert next_run_path(tmp_path, "fed-sb") == tmp_path / "fed-sb-003"
