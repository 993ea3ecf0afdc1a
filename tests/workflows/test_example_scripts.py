"""The scripts in examples/ and the code in docs/python.md run as they stand, on a tiny job."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedtune
from fedtune.job import to_toml

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
ON_A_JOB = [script for script in SCRIPTS if script.stem in ("own_rule", "own_selection")]


def ran(arguments, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short(script):
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 60


def test_a_model_of_ones_own_learns(tmp_path):
    said = ran([str(ROOT / "examples" / "own_model.py"), "run"], tmp_path)
    run = fedtune.open_run(tmp_path / "run")
    assert run.rounds[-1]["accuracy"] > 0.6 > 0.3 > run.rounds[0]["accuracy"] and "accuracy" in said


def test_a_sweep_draws_its_plot(tiny_job, tmp_path):
    (tmp_path / "job.toml").write_text(to_toml(tiny_job("data.clients=6")))
    said = ran([str(ROOT / "examples" / "sweep.py"), "job.toml", "out"], tmp_path)
    assert [line.split(":")[0] for line in said.splitlines()] == ["fed-sb", "ffa-lora", "lora"]
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", ON_A_JOB, ids=lambda path: path.stem)
def test_a_script_runs(script, tiny_job, tmp_path):
    (tmp_path / "job.toml").write_text(to_toml(tiny_job("data.clients=6")))
    said = ran([str(script), "job.toml", "run"], tmp_path)
    run = fedtune.open_run(tmp_path / "run")
    assert len(run.rounds) == 4 and run.summary["complete"] and "accuracy" in said


def test_the_code_of_the_page_runs(tiny_job, tmp_path):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "job.toml").write_text(to_toml(tiny_job("data.clients=6", "federation.cohort=3")))
    checks = "from fedtune.workflows.python import job_of\nassert job_of(small).federation.local_steps == 4\n"
    (tmp_path / "page.py").write_text("\n".join([*blocks, checks]))
    ran(["page.py"], tmp_path)
    for name in ("first", "own", "middle", "largest"):
        assert fedtune.open_run(tmp_path / "runs" / name).summary["complete"]
