"""Every benchmark runs, and says what it measured in one line of JSON. Figures are not judged here: a test
machine is no place for that.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
BENCHMARKS = sorted(FOLDER.glob("*.py"))
# six processes with a CNN; graphs of MiniLM; two real federations, of which tests/deploy covers ours; MiniLM.
# tests/training and tests/edge cover the steps
MINUTES = ("edge_memory", "edge_step", "live_overhead", "privacy_cost")
SLOW = ("simulation", "population")
# the rest loads MiniLM five times, and pfl from a registry
PART = {"simulation": ("--cases", "c,d", "--peers", "flower", "--threads", "1")}


def run(path, *options):
    return subprocess.run(
        [sys.executable, path, "--quick", *options], capture_output=True, text=True, timeout=600, check=True
    ).stdout


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=pytest.mark.slow) if p.stem in SLOW else p
        for p in BENCHMARKS
        if p.stem not in MINUTES
    ],
    ids=lambda p: p.stem,
)
def test_a_quick_run_ends_with_its_targets(path):
    found = json.loads(run(path, "--json", *PART.get(path.stem, ())).splitlines()[-1])
    assert found["targets"]
    for target in found["targets"]:
        assert target.keys() == {"name", "value", "target", "met"}
        assert (
            target["name"]
            and target["target"]
            and type(target["met"]) is bool
            and math.isfinite(target["value"])
        )


def test_the_readme_has_a_section_and_the_command_for_each():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in BENCHMARKS:
        assert f"## {path.stem}\n" in text and f"python benchmarks/{path.name}" in text


def test_the_coordinator_takes_every_update_of_the_quick_run():
    found = json.loads(run(FOLDER / "coordinator_scale.py", "--json").splitlines()[-1])
    blocks = found["updates"] // found["block"]
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == {
        "fedtune": blocks,
        "float32": blocks,
        "float64": blocks,
    }
    assert list(found["memory_mb"]) == [str(found["updates"] // 10), str(found["updates"])]
    assert "throughput" in run(FOLDER / "coordinator_scale.py")
