"""The memory limit of a device without torch: how many rows keep it, and that it is kept."""

import json
import subprocess
import sys

import pytest

from fedtune.edge import memory
from fedtune.errors import UserError

MB = memory.MB


class Machine:
    """100 MB before anything; the first step brings 40 of 50 MB of weights in,
    and each row takes 20 MB while it runs.
    """

    def __init__(self, monkeypatch):
        self.now = self.most = 100 * MB
        self.ran = []
        monkeypatch.setattr(memory, "resident", lambda: self.now)
        monkeypatch.setattr(memory, "peak", lambda: self.most)
        monkeypatch.setattr(memory, "_status", lambda key: {"RssFile": 30 * MB + self.now - 100 * MB}[key])

    def run(self, rows):
        self.ran.append(rows)
        self.now = 140 * MB
        self.most = max(self.most, (140 + 20 * rows) * MB)


@pytest.mark.parametrize("limit, rows", [(0, 8), (1000, 8), (290, 6), (250, 4), (243, 4), (210, 1), (179, 1)])
def test_as_many_rows_as_fit(limit, rows, monkeypatch):
    machine = Machine(monkeypatch)
    assert memory.rows_within(limit, 8, machine.run, 50 * MB) == rows
    machine.run(rows)
    assert not limit or machine.most + 10 * MB <= limit * MB  # also with all weights in memory


def test_a_limit_below_one_row_names_what_is_needed(monkeypatch):
    machine = Machine(monkeypatch)
    with pytest.raises(
        UserError,
        match=(
            r"^--memory-mb 170: a step of one example takes 170 MB here, "
            r"and 5% stays free; give at least 179$"
        ),
    ):
        memory.rows_within(170, 8, machine.run, 50 * MB)
    assert memory.rows_within(179, 8, Machine(monkeypatch).run, 50 * MB) == 1


def test_memory_is_read_from_the_system(monkeypatch):
    held = memory.peak()
    block = b"x" * (64 * MB)
    assert memory.peak() >= memory.resident() > 20 * MB and memory.peak() >= held and len(block)
    monkeypatch.setattr(memory, "_status", lambda key: 0)
    assert memory.resident() == memory.peak() > 20 * MB


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fedtune.cli.main", "edge", "bench", *arguments],
        capture_output=True,
        text=True,
    )


def test_the_limit_is_kept_or_refused(prepared):
    graphs = str(prepared().graphs)
    free = bench("--graphs", graphs, "--batch-size", "64", "--steps", "2", "--json")
    assert free.returncode == 0, free.stderr
    figures = json.loads(free.stdout)
    assert (
        figures["examples"] == 64
        and figures["at_once"] == 16
        and figures["length"] == 16
        and figures["steps"] == 2
    )
    assert (
        figures["peak_bytes"] > figures["start_bytes"] > 0
        and figures["step_seconds"] >= figures["step_seconds_least"] > 0
    )
    assert list(figures["units_seconds"]) == ["block.1"] and figures["units_seconds"]["block.1"] > 0
    assert figures["disk_bytes"] == sum(p.stat().st_size for p in prepared().graphs.iterdir())
    limit = figures["peak_bytes"] // MB + 20
    kept = bench("--graphs", graphs, "--batch-size", "64", "--memory-mb", str(limit), "--json")
    assert kept.returncode == 0 and json.loads(kept.stdout)["peak_bytes"] <= limit * MB, kept.stderr
    refused = bench("--graphs", graphs, "--memory-mb", "30")
    assert (
        refused.returncode == 2
        and refused.stderr.startswith("fedtune: --memory-mb 30: a step of one example takes ")
        and refused.stderr.count("\n") == 1
    )
