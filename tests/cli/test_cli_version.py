"""`fedtune --version`."""

from typer.testing import CliRunner

import fedtune
from fedtune.cli.main import app


def test_the_version_is_printed_and_nothing_else():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"fedtune {fedtune.__version__}\n", "")


def test_help_names_it():
    assert "--version" in CliRunner().invoke(app, ["--help"]).stdout
