"""`fedtune --version`, and the one place that the number comes from."""

from importlib import metadata

from typer.testing import CliRunner

import fedtune
from fedtune.cli.main import app


def test_the_version_is_printed_and_nothing_else():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"fedtune {fedtune.__version__}\n", "")


def test_help_names_it():
    assert "--version" in CliRunner().invoke(app, ["--help"]).stdout


def test_the_installed_package_has_the_same_version():
    assert metadata.version("fedtune") == fedtune.__version__
