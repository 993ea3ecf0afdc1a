"""Files that are there whole or not at all, whatever comes between."""

import os

import pytest

from fedtune.common.storage import write_atomic
from fedtune.errors import EnvironmentProblem, UserError


@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_is_ctrl_c_at_every_instant(after, tmp_path, monkeypatch):
    """Before and after the new file has its place; it never becomes an error about a file."""
    path, replace = tmp_path / "file", os.replace
    write_atomic(path, b"old")

    def interrupted(*names):
        if after:
            replace(*names)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == (b"new" if after else b"old") and len(list(tmp_path.iterdir())) == 1


def test_places_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        write_atomic(tmp_path / "none" / "file", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises((UserError, EnvironmentProblem), match="cannot write"):
        write_atomic(tmp_path / "folder", b"")
    assert not list(tmp_path.glob(".*"))
