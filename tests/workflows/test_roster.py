"""The devices that are let in follow the folder of their keys, whatever is done to it, and trouble there
leaves them as they were.
"""

from types import SimpleNamespace

import pytest

from fedtune import provision
from fedtune.errors import UserError
from fedtune.workflows import serve


class Link:
    """The part of a SuperLink that knows devices."""

    def __init__(self):
        self.keys: dict[bytes, int] = {}

    def register(self, name, key):
        return self.keys.setdefault(key, len(self.keys) + 1)

    def registered(self):
        return dict(self.keys)

    def unregister(self, node):
        self.keys = {key: n for key, n in self.keys.items() if n != node}


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "ROSTER_POLL", 0.0)
    provision.make(tmp_path / "keys", ["127.0.0.1"], ["one", "two"])
    provision.make(tmp_path / "other", ["127.0.0.1"], ["three"])
    link, folder = Link(), tmp_path / "keys" / "server" / "devices"
    return SimpleNamespace(
        link=link,
        folder=folder,
        roster=serve.Roster(link, folder),
        other=tmp_path / "other" / "server" / "devices" / "three.pub",
    )


def test_devices_come_and_go(made):
    assert sorted(made.roster().values()) == ["one", "two"]
    (made.folder / "two.pub").unlink()
    assert sorted(made.roster().values()) == ["one"] and len(made.link.keys) == 1
    (made.folder / "three.pub").write_bytes(made.other.read_bytes())
    assert sorted(made.roster().values()) == ["one", "three"] and len(made.link.keys) == 2


def test_a_key_written_over_in_place_shuts_the_old_one_out(made):
    before = {name: node for node, name in made.roster().items()}
    (made.folder / "one.pub").write_bytes(made.other.read_bytes())
    after = {name: node for node, name in made.roster().items()}
    assert after["two"] == before["two"] and after["one"] != before["one"] and len(made.link.keys) == 2


def test_trouble_leaves_the_devices_as_they_were(made, caplog):
    before = dict(made.roster())
    (made.folder / "half.pub").write_text("ecdsa-sha2-nistp384 AAAA")
    assert made.roster() == before and made.roster() == before
    assert len(caplog.records) == 1 and "half.pub" in caplog.text and "stay as they were" in caplog.text
    (made.folder / "half.pub").unlink()
    assert made.roster() == before


def test_trouble_at_the_start_is_said(made):
    (made.folder / "half.pub").write_text("not a key")
    with pytest.raises(UserError, match=r"half\.pub"):
        made.roster()
