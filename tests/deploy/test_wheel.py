"""The wheel: what is in it, and that it works where no checkout is near."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import fedtune

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE")


def run(*command, cwd):
    """Standard output of a command that sees neither the checkout nor this process's settings of Python."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout gets no build folder and none that lies there is packed."""
    copy, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copy(CHECKOUT / name, copy)
    shutil.copytree(CHECKOUT / "fedtune", copy / "fedtune", ignore=shutil.ignore_patterns("__pycache__"))
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", built, copy, cwd=copy
    )
    (found,) = built.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with this wheel alone. The packages that it needs are looked up in the environment of
    the tests; a line in a .pth file runs no .pth file there, so the checkout stays out of sight.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    paths = sysconfig.get_paths()
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (site / "needed.pth").write_text(f"{paths['purelib']}\n{paths['platlib']}\n")
    return folder


def test_it_holds_the_whole_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("fedtune/")}
    package = CHECKOUT / "fedtune"
    expected = {
        str(path.relative_to(CHECKOUT))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == expected
    assert {"fedtune/py.typed", "fedtune/report/page.html", "fedtune/report/page.css"} <= held


def test_its_metadata_names_licence_and_links(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        licence = archive.read(f"{info}/licenses/LICENSE")
    assert licence == (CHECKOUT / "LICENSE").read_bytes()
    assert metadata["Version"] == fedtune.__version__
    assert (metadata["License-Expression"], metadata.get_all("License-File")) == ("Apache-2.0", ["LICENSE"])
    links = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL"))
    assert links.keys() == {"Homepage", "Documentation", "Issues", "Changelog"}
    assert "Typing :: Typed" in metadata.get_all("Classifier") and metadata["Keywords"]


def test_it_works_from_an_empty_folder(installed, tiny_settings, tmp_path):
    python, command = installed / "bin" / "python", installed / "bin" / "fedtune"
    where = run(python, "-c", "import fedtune; print(fedtune.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    assert run(command, "--version", cwd=tmp_path) == f"fedtune {fedtune.__version__}\n"
    changes = [part for setting in tiny_settings for part in ("--set", setting)]
    assert "trained" in run(command, "plan", *changes, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
