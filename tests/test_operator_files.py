"""What stands in server/, client/ and edge/ is what the code has: keys, options, variables,
metrics, exit codes, waits.
"""

import configparser
import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import typer

from fedtune import packages
from fedtune.cli.common import INTERRUPTED
from fedtune.cli.main import app
from fedtune.client.policy import Policy, load_policy
from fedtune.errors import PrivacyRefused, UserError
from fedtune.job import load_job
from fedtune.process import waits
from fedtune.server import metrics

ROOT = Path(__file__).parents[1]
ROLES = ("server", "client", "edge")
DEVICE_STOP = waits.SUPERNODE_STOP + waits.GOODBYE_SECONDS + waits.TRAINER_STOP
STOPS = {"server": waits.SUPERLINK_STOP + 1, "client": DEVICE_STOP, "edge": DEVICE_STOP}
COMMANDS = typer.main.get_command(app).commands
CALL = re.compile(rf"(?:^|[\s/\"`])fedtune ((?:{'|'.join(COMMANDS)})\b.*)")


def text(role, name):
    return (ROOT / role / name).read_text(encoding="utf-8")


def settings(role):
    """The environment file, read as systemd and podman read it."""
    lines = [
        line for line in text(role, f"fedtune-{role}.env").splitlines() if line and not line.startswith("#")
    ]
    return dict(line.split("=", 1) for line in lines)


def unit(role):
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str
    found.read_string(text(role, f"fedtune-{role}.service"))
    return found["Service"]


def instruction(role, name):
    """An instruction of the container file, continued lines joined."""
    (found,) = re.findall(rf"^{name} (.*)$", text(role, "Containerfile").replace("\\\n", ""), re.MULTILINE)
    return found


def variables(line):
    return set(re.findall(r"\$\{?([A-Z][A-Z_]*)", line))


def filled(line, values):
    return re.sub(r"\$\{?([A-Z][A-Z_]*)\}?", lambda m: values[m[1]], line)


def parse(call):
    """Lets the real command read a command line, which must be complete."""
    words = shlex.split(call, comments=True)
    words = words[: next((i for i, w in enumerate(words) if w in ("&", "&&", "|", "…")), len(words))]
    command, rest = find(words)
    command.make_context(words[0], rest)


def find(words):
    """The command or subcommand, and what stands behind its name."""
    command, rest = COMMANDS[words[0]], words[1:]
    if isinstance(command, click.Group) and rest and rest[0] in command.commands:
        return command.commands[rest[0]], rest[1:]
    return command, rest


def test_the_job_is_valid():
    job = load_job(ROOT / "server" / "job.toml")
    assert job.data.labels and job.federation.min_replies <= job.federation.cohort


def test_the_policy_shows_every_key_and_limits_nothing(tmp_path):
    assert load_policy(ROOT / "client" / "policy.toml") == Policy()
    shown = re.sub(r"^# (?=[a-z-]+ = )", "", text("client", "policy.toml"), flags=re.MULTILINE)
    (tmp_path / "policy.toml").write_text(shown)
    load_policy(tmp_path / "policy.toml")
    assert tomllib.loads(shown).keys() == {name.replace("_", "-") for name in Policy.model_fields}


@pytest.mark.parametrize("role", ROLES)
def test_settings_are_those_of_unit_and_container(role):
    own = {"FEDTUNE_CACHE"} if role == "client" else set()  # fedtune reads it itself
    assert all(name in Path(packages.__file__).read_text(encoding="utf-8") for name in own)
    given = settings(role)
    assert variables(unit(role)["ExecStart"]) == given.keys() - own
    defaults = dict(word.split("=", 1) for word in shlex.split(instruction(role, "ENV")))
    assert defaults.keys() == given.keys()
    assert variables(instruction(role, "ENTRYPOINT")) == given.keys() - own
    assert defaults["DIR"] == given["DIR"] == f"/var/lib/{unit(role)['StateDirectory']}"
    assert unit(role)["EnvironmentFile"] == f"/etc/fedtune/fedtune-{role}.env"


@pytest.mark.parametrize("role", ROLES)
def test_unit_and_container_start_what_there_is(role):
    for line in (
        unit(role)["ExecStart"],
        " ".join(json.loads(instruction(role, "ENTRYPOINT"))[2].split('"$@"')),
    ):
        call = CALL.search(filled(line, settings(role)))
        assert call and shlex.split(call[1])[0] == role
        parse(call[1])


@pytest.mark.parametrize("role", ROLES)
def test_the_unit_knows_exit_codes_and_stop_times(role):
    service = unit(role)
    assert service["RestartPreventExitStatus"].split() == [
        str(e.exit_code) for e in (UserError, PrivacyRefused)
    ]
    assert service["SuccessExitStatus"] == str(INTERRUPTED)
    assert float(service["TimeoutStopSec"]) > STOPS[role]


@pytest.mark.parametrize("role", ROLES)
def test_the_container_installs_its_role_with_pins(role):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (run,) = re.findall(r"^RUN (pip .*)$", text(role, "Containerfile"), re.MULTILINE)
    assert (
        run.endswith(f'--constraint constraints.txt ".[{role}]"') and role in project["optional-dependencies"]
    )
    copied = [
        name
        for line in re.findall(r"^COPY (.*)$", text(role, "Containerfile"), re.MULTILINE)
        for name in line.split()[:-1]
    ]
    allowed = re.findall(r"^!(.*)$", text(role, "Containerfile.dockerignore"), re.MULTILINE)
    assert sorted(copied) == sorted(allowed) and all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("role", ROLES)
def test_commands_in_the_readme_are_commands(role):
    readme = text(role, "README.md").replace("\\\n", "")
    calls = [
        call[1] for line in readme.splitlines() if line.startswith("    ") and (call := CALL.search(line))
    ]
    assert len(calls) > 6
    for call in calls:
        parse(call)
    for span in re.findall(r"`(fedtune [^`]*)`", readme):  # in prose, where what is plain is left out
        if call := CALL.search(span):
            command, rest = find(call[1].split())
            known = {option for p in command.params for option in p.opts}
            assert {word for word in rest if word.startswith("-")} <= known, span


def test_metrics_are_those_of_the_readme(monkeypatch):
    monkeypatch.setattr(metrics, "start_http_server", lambda *_: None)
    suffix = {"counter": "_total", "info": "_info"}
    names = {m.name + suffix.get(m.type, "") for m in metrics.Exporter("127.0.0.1", 1).registry.collect()}
    assert set(re.findall(r"fedtune_[a-z_]+", text("server", "README.md"))) == names
