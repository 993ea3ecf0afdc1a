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


def ran(arguments, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs(script, tiny_job, tmp_path):
    (tmp_path / "job.toml").write_text(to_toml(tiny_job("data.clients=6")))
    said = ran([str(script), "job.toml", "run"], tmp_path)
    run = fedtune.open_run(tmp_path / "run")
    assert len(run.rounds) == 4 and run.summary["complete"] and "accuracy" in said
    assert len(script.read_text().splitlines()) <= 60


def test_the_code_of_the_page_runs(tiny_job, tmp_path):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "job.toml").write_text(to_toml(tiny_job("data.clients=6", "federation.cohort=3")))
    checks = "from fedtune.workflows.python import job_of\nassert job_of(small).federation.local_steps == 4\n"
    (tmp_path / "page.py").write_text("\n".join([*blocks, checks]))
    ran(["page.py"], tmp_path)
    for name in ("first", "middle", "largest"):
        assert fedtune.open_run(tmp_path / "runs" / name).summary["complete"]
