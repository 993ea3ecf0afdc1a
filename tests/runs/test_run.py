"""Run folders: never overwritten, and their parts as they were written."""

import json
import subprocess
import sys

import numpy as np
import pytest

from fedtune.algorithms import State
from fedtune.errors import RunError, UserError
from fedtune.job import Job, parse_job
from fedtune.runs.checkpoint import Checkpoint
from fedtune.runs.folder import create_run, next_run_path, open_run

FACTS = {"created": "now", "versions": {"fedtune": "1"}, "sha256": "00", "split": []}


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path / "runs" / "one", parse_job("", ["federation.rounds=9"]), FACTS)


def at(round):
    return Checkpoint(State(round, {"x": np.full(2, round, np.float32)}), {})


def rounds_on_disk(run):
    return sorted(int(p.stem[-5:]) for p in (run.path / "checkpoints").iterdir())


def test_the_job_is_kept_whole(run):
    again = open_run(run.path)
    assert (
        again.job() == parse_job("", ["federation.rounds=9"])
        and {k: v for k, v in again.facts().items() if k != "job_sha256"} == FACTS
    )


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


@pytest.mark.parametrize(
    "make",
    [lambda p: p.write_text("a file"), lambda p: (p.mkdir(), (p / "mine.txt").write_text("keep"))],
    ids=["file", "folder"],
)
def test_nothing_is_ever_overwritten(make, tmp_path):
    make(tmp_path / "run")
    with pytest.raises(
        RunError,
        match=(
            r"is a file; choose another --out|already exists and is not empty; "
            r"choose another --out, or continue it with --resume"
        ),
    ):
        create_run(tmp_path / "run", Job(), {})
    assert {p.name for p in tmp_path.rglob("*")} <= {"run", "mine.txt"}


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    assert create_run(tmp_path / "run", Job(), {}).job() == Job()


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*: Not a directory"):
        create_run(tmp_path / "file" / "run", Job(), {})


@pytest.mark.parametrize("missing", ["run.json", "job.toml"])
def test_a_folder_without_its_files_is_no_run(missing, run):
    (run.path / missing).unlink()
    with pytest.raises(RunError, match="not a run folder"):
        open_run(run.path)


def test_broken_facts_are_said(run):
    (run.path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json: damaged"):
        open_run(run.path).facts()


def test_numbers_of_runs_go_up(tmp_path):
    assert next_run_path(tmp_path, "fed-sb") == tmp_path / "fed-sb-001"
    (tmp_path / "fed-sb-001").mkdir()
    (tmp_path / "fed-sb-002").write_text(json.dumps({}))
    assert next_run_path(tmp_path, "fed-sb") == tmp_path / "fed-sb-003"


def test_a_changed_job_is_not_gone_on_with(run):
    run.require_own_job()
    path = run.path / "job.toml"
    path.write_text(path.read_text().replace("rounds = 9", "rounds = 10"))
    with pytest.raises(RunError, match=r"job\.toml: was changed since the run began; restore it"):
        run.require_own_job()


@pytest.mark.parametrize("cut", ["", "{", '{"round": 2, "lo', '{"round": 2}'])
@pytest.mark.parametrize("long", [False, True])
def test_a_line_that_was_cut_off_is_written_again(cut, long, run):
    """Killed while it wrote: the round has no checkpoint, so it is run again."""
    more = {"clients": ["c" * 50] * 400} if long else {}
    for round in range(2):
        run.append_metrics({"round": round, **more})
    path = run.path / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + cut.encode())
    assert [line["round"] for line in run.metrics()] == [0, 1]
    run.append_metrics({"round": 2, **more})
    assert path.read_bytes().startswith(before) and [line["round"] for line in run.metrics()] == [0, 1, 2]
    run.append_metrics({"round": 1, "again": True})
    assert run.metrics() == [{"round": 0, **more}, {"round": 1, "again": True}]


@pytest.mark.parametrize(
    "text", ["{\n", '{"round": 1}\n', '{"round": 0}\n{"round": 2}\n', "[]\n", '{"loss": 1}\n']
)
def test_damaged_metrics_are_said(text, run):
    (run.path / "metrics.jsonl").write_text(text)
    with pytest.raises(RunError, match=r"metrics\.jsonl: .*; restore it or begin a new run"):
        run.metrics()


def test_a_run_is_held_by_one_process(run):
    held = (
        "import sys; from pathlib import Path; from fedtune.runs.folder import open_run\n"
        "with open_run(Path(sys.argv[1])).locked(): pass"
    )
    with run.locked():
        other = subprocess.run([sys.executable, "-c", held, str(run.path)], capture_output=True, text=True)
        assert other.returncode and "another process is running it" in other.stderr
    subprocess.run([sys.executable, "-c", held, str(run.path)], check=True)
