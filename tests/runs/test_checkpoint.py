"""Checkpoints: whole or absent, equal when read again, and refused when they are not what was written."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedtune.algorithms import State
from fedtune.common import storage
from fedtune.errors import EnvironmentProblem, RunError, UserError
from fedtune.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

STATE = State(
    7,
    {"b.R": np.arange(6, dtype=np.float32).reshape(2, 3), "a.R": np.ones((), np.float32)},
    {"moment": np.array([1e-30], np.float64)},
)
COUNTERS = {"up": {"c1": 12}, "down": {}, "rounds": {"c1": 1}}


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "round-00007.safetensors", Checkpoint(STATE, COUNTERS))
    return tmp_path / "round-00007.safetensors"


def test_read_as_written(path):
    found = load_checkpoint(path)
    assert (found.state.round, found.counters) == (7, COUNTERS)
    for kind in ("arrays", "slots"):
        wanted, got = getattr(STATE, kind), getattr(found.state, kind)
        assert wanted.keys() == got.keys()
        assert all(
            np.array_equal(wanted[n], got[n])
            and wanted[n].dtype == got[n].dtype
            and wanted[n].shape == got[n].shape
            for n in wanted
        )


def test_the_same_state_is_the_same_bytes(path, tmp_path):
    for _ in range(8):
        save_checkpoint(tmp_path / "again.safetensors", Checkpoint(STATE, COUNTERS))
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_a_file_cut_short_is_refused(kept, path):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        RunError, match=r"not a checkpoint of fedtune .* remove it to resume from the one before"
    ):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "metadata", [None, {"fedtune": "no JSON"}, {"fedtune": "{}"}, {"fedtune": "[]"}, {"other": "1"}]
)
def test_another_safetensors_file_is_refused(metadata, path):
    save_file({"model/x": np.zeros(1, np.float32)}, path, metadata)
    with pytest.raises(RunError, match="not a checkpoint of fedtune"):
        load_checkpoint(path)


def test_another_format_names_both(path):
    path.write_bytes(path.read_bytes().replace(b'format\\": \\"1', b'format\\": \\"9'))
    with pytest.raises(RunError, match="checkpoint format 9, this fedtune reads 1"):
        load_checkpoint(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RunError, match="is missing"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_a_failed_write_leaves_the_old_file_and_no_other(path, monkeypatch):
    old = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*: No space left on device; free space"):
        save_checkpoint(path, Checkpoint(State(8, {}), {}))
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        save_checkpoint(tmp_path / "none" / "x.safetensors", Checkpoint(STATE, COUNTERS))
