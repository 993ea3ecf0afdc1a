"""fedtune provision as typed: what it prints, and that every mistake is one line and changes nothing."""

import inspect
import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fedtune import provision as library
from fedtune.cli import provision

app = typer.Typer(suggest_commands=False, pretty_exceptions_enable=False)
app.add_typer(provision.app)
MAKE = ["--host", "fed.example.org", "--host", "192.0.2.7", "--devices", "2", "-o", "keys"]


@app.command()
def other():
    """So that `provision` is a command among others, as it is in `fedtune`."""


def invoke(arguments, wide=500):
    return CliRunner().invoke(
        app, ["provision", *arguments], terminal_width=wide, env={"COLUMNS": str(wide), "NO_COLOR": "1"}
    )


def said(*arguments):
    done = invoke(arguments)
    assert done.exit_code == 0 and not done.stderr, (done.output, done.exception)
    return done.stdout


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.fixture
def keys(place):
    said(*MAKE)
    return place / "keys"


def check_refused(place, arguments, expected, code=2):
    before = {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}
    done = invoke(arguments)
    assert isinstance(done.exception, SystemExit) and done.exit_code == code, (done.output, done.exception)
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("fedtune: ") and not done.stdout, (
        done.output
    )
    assert re.search(expected, done.stderr), done.stderr
    assert {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")} == before


def test_make_says_what_is_next():
    lines = said(*MAKE).splitlines()
    assert lines[0] == (
        "made: the CA; the server certificate for fed.example.org, 192.0.2.7, localhost, 127.0.0.1, ::1; "
        "2 devices (device-001, device-002)"
    )
    today = datetime.now(UTC)
    table = [line.split() for line in lines]
    for name, days, file in (("CA", 1825, "keys/ca/ca.crt"), ("server", 365, "keys/server/server.crt")):
        row = next(row for row in table if row[:1] == [name])
        assert row[1] in {f"{today + timedelta(days=days + late):%Y-%m-%d}" for late in (-1, 0)} and row[
            2:
        ] == [f"{days:,}", "days", file]
    assert [line for line in lines if line.startswith("- ")] == [
        "- keep keys/ca offline: whoever holds ca.key can pose as the coordinator; only renewing needs it",
        "- copy keys/server to the coordinator",
        (
            "- copy each folder in keys/devices to the device of its name, "
            "and to no other: device-001, device-002"
        ),
    ]
    assert lines[-3:] == [
        "next:",
        "  fedtune server JOB --dir keys/server --address fed.example.org:9092",
        "  fedtune client --server fed.example.org:9092 --dir keys/devices/device-001 --data DATA",
    ]


def test_an_ipv6_host_and_a_folder_with_a_space_can_be_pasted():
    lines = said("--host", "2001:db8::1", "--device", "lab", "-o", "my keys").splitlines()
    assert lines[-2:] == [
        "  fedtune server JOB --dir 'my keys/server' --address '[2001:db8::1]:9092'",
        "  fedtune client --server '[2001:db8::1]:9092' --dir 'my keys/devices/lab' --data DATA",
    ]


def test_adding_says_what_was_there(keys):
    before = {path: path.read_bytes() for path in keys.rglob("*") if path.is_file()}
    lines = said("--devices", "3", "--device", "lab", "-o", "keys").splitlines()
    assert lines[:2] == [
        "made: 2 devices (device-003, lab)",
        (
            "left as it was: the CA; the server certificate for fed.example.org, 192.0.2.7, localhost, "
            "127.0.0.1, ::1; 2 devices (device-001, device-002)"
        ),
    ]
    assert "- copy keys/server/devices to the coordinator: it lets in the devices listed there" in lines
    assert lines[-1].endswith("--dir keys/devices/device-003 --data DATA")
    assert {path: path.read_bytes() for path in before} == before


def test_force_says_what_went(keys):
    lines = said("--host", "new.example.org", "--device", "device-002", "-o", "keys", "--force").splitlines()
    assert lines[:2] == [
        (
            "made: the CA; the server certificate for new.example.org, localhost, 127.0.0.1, "
            "::1; 1 device (device-002)"
        ),
        "removed: device-001",
    ]
    assert "- copy keys/server to the coordinator in place of the old one" in lines


def test_days(place):
    said(*MAKE, "--days", "7", "--ca-days", "8")
    found = json.loads(said("show", "-o", "keys", "--json"))
    assert [item["days_left"] for item in found] == [8, 7, None, None]


def test_many_devices_are_summed_up():
    out = said("--host", "a.example", "--devices", "6", "-o", "keys")
    assert "6 devices (device-001 … device-006)" in out and "device-004" not in out


def test_renew(keys):
    assert said("renew", "-o", "keys").splitlines()[:2] == [
        "nothing expires within 30 days",
        (
            "left as it was: the CA; the server certificate for fed.example.org, "
            "192.0.2.7, localhost, 127.0.0.1, ::1"
        ),
    ]
    lines = said("renew", "-o", "keys", "--within", "400", "--days", "10").splitlines()
    assert lines[:2] == [
        "renewed: the server certificate for fed.example.org, 192.0.2.7, localhost, 127.0.0.1, ::1",
        "left as it was: the CA",
    ]
    assert lines[-1] == "- copy keys/server to the coordinator and restart it"
    assert said("renew", "-o", "keys", "--host", "new.example.org").startswith(
        "renewed: the server certificate for new.example.org, localhost"
    )
    lines = said("renew", "-o", "keys", "--device", "device-002").splitlines()
    assert (
        lines[0] == "renewed: 1 device (device-002)"
        and lines[-1] == "- copy keys/devices/device-002 to device-002, and to no other device"
    )
    lines = said("renew", "-o", "keys", "--within", "3000").splitlines()
    assert lines[0].startswith("renewed: the CA; the server certificate for new.example.org")
    assert any(
        line.startswith("- every device needs the new ca.crt: copy keys/server/ca.crt to each, before ")
        for line in lines
    )


def test_show(keys):
    rows = [line.split() for line in said("show", "-o", "keys").splitlines() if line.strip()]
    assert rows[0] == ["what", "good", "until", "left", "file", "note"]
    assert [row[0] for row in rows[2:]] == ["CA", "server", "device-001", "device-002"]
    assert rows[3][5:] == ["fed.example.org,", "192.0.2.7,", "localhost,", "127.0.0.1,", "::1"]
    assert rows[4][1:] == ["does", "not", "expire", "keys/devices/device-001/device.key"]
    (keys / "ca" / "ca.key").unlink()
    (keys / "devices" / "device-001" / "device.key").unlink()
    out = said("show", "-o", "keys")
    assert re.search(r"keys/ca/ca\.crt +key kept elsewhere", out) and re.search(
        r"keys/server/devices/device-001\.pub +key delivered", out
    )


def test_show_says_what_expired(place):
    library.make(
        place / "keys",
        ("fed.example.org",),
        ("lab",),
        days=1,
        ca_days=30,
        now=datetime.now(UTC) - timedelta(days=5),
    )
    assert re.search(r"server +\d{4}-\d\d-\d\d +expired +keys/server/server\.crt", said("show", "-o", "keys"))


def test_show_as_json(keys):
    found = json.loads(said("show", "-o", "keys", "--json"))
    assert [(item["kind"], item["name"]) for item in found] == [
        ("ca", "CA"),
        ("server", "server"),
        ("device", "device-001"),
        ("device", "device-002"),
    ]
    assert datetime.fromisoformat(found[1]["not_after"]) == library.inspect(keys)[1].not_after
    assert found[1]["hosts"] == ["fed.example.org", "192.0.2.7", "localhost", "127.0.0.1", "::1"]
    assert found[2] == {
        "name": "device-001",
        "kind": "device",
        "path": "keys/devices/device-001/device.key",
        "not_after": None,
        "days_left": None,
        "hosts": [],
        "has_key": True,
    }


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], r"provision needs --host NAME-OR-IP, --devices N and -o DIR; see `fedtune provision --help`"),
        (["--host", "a.example", "--devices", "2"], r"provision needs "),
        (
            ["--devices", "2", "-o", "keys"],
            r"no host: give --host with the name or IP address devices reach the coordinator under",
        ),
        (["--host", "a.example", "-o", "keys"], r"no device: give --devices 1 to 10000, or --device NAME"),
        (
            ["--host", "a.example", "-o", "keys", "--devices", "0"],
            r"--devices 0: give --devices 1 to 10000, or --device NAME",
        ),
        (["--host", "a.example", "-o", "keys", "--devices", "-1"], r"--devices -1: give 1 to 10000"),
        (["--host", "a.example", "-o", "keys", "--devices", "10001"], r"--devices 10001: give 1 to 10000"),
        (
            ["--host", "a.example", "-o", "keys", "--device", "a/b"],
            r"device name 'a/b': give letters, digits and",
        ),
        (
            ["--host", "a.example", "-o", "keys", "--device", "a", "--device", "A"],
            r"device name 'A': differs from 'a' in upper and lower case only",
        ),
        (
            ["--host", "https://a.example", "-o", "keys", "--devices", "1"],
            r"--host 'https://a\.example': is a URL",
        ),
        (
            ["--host", "a.example:9092", "-o", "keys", "--devices", "1"],
            r"--host 'a\.example:9092': has a port",
        ),
        (
            ["--host", "*.a.example", "-o", "keys", "--devices", "1"],
            r"--host '\*\.a\.example': is a wildcard",
        ),
        (["--host", "___", "-o", "keys", "--devices", "1"], r"--host '___': neither a DNS name"),
        (
            ["--host", "a" * 254, "-o", "keys", "--devices", "1"],
            r"has 254 characters; a DNS name has at most 253",
        ),
        (
            ["--host", "é.example", "-o", "keys", "--devices", "1"],
            r"--host 'é\.example': holds characters outside ASCII; give the punycode form",
        ),
        ([*MAKE, "--days", "0"], r"--days 0: give 1 to 3650"),
        ([*MAKE, "--days", "3651"], r"--days 3651: give 1 to 3650"),
        ([*MAKE, "--days", "100", "--ca-days", "99"], r"--ca-days 99: give --days \(100\)"),
        ([*MAKE[:-1], "file"], r"file: not a folder; choose another place with -o"),
        (
            ["renew", "-o", "keys"],
            r"keys: nothing is provisioned here; `fedtune provision --host NAME --devices N -o keys` does it",
        ),
        (["show", "-o", "file"], r"file: nothing is provisioned here"),
        (["renew", "-o", "file"], r"file: not a folder"),
        (
            ["--devices", "2", "renew", "-o", "keys"],
            r"options stand after renew: `fedtune provision renew -o DIR …`",
        ),
        (["-o", "keys", "show", "-o", "keys"], r"options stand after show"),
    ],
)
def test_a_mistake_is_one_line(arguments, expected, place):
    check_refused(place, arguments, expected)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            ["--host", "new.example.org", "--devices", "3", "-o", "keys"],
            (
                r"server\.crt: is for fed\.example\.org, .*; change it with `fedtune provision renew -o "
                r"keys --host …`, or .* --force"
            ),
        ),
        (
            ["renew", "-o", "keys", "--device", "device-003"],
            r"--device device-003: not known here; did you mean device-00",
        ),
        (["renew", "-o", "keys", "--within", "-1"], r"--within -1: give 0 to 3650 days"),
        (["renew", "-o", "keys", "--host", "a b"], r"--host 'a b': neither a DNS name"),
    ],
)
def test_a_mistake_beside_keys_is_one_line(arguments, expected, place, keys):
    check_refused(place, arguments, expected)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ca/ca.key", r"keys/ca/ca\.key: not an EC private key in PEM form"),
        ("ca/ca.crt", r"keys/ca/ca\.crt: not a certificate in PEM form"),
    ],
)
def test_damage_is_one_line(name, expected, place, keys):
    (keys / name).write_text("none")
    check_refused(place, ["--devices", "3", "-o", "keys"], expected)
    check_refused(place, ["renew", "-o", "keys"], expected)


def test_a_missing_ca_key_is_one_line(place, keys):
    (keys / "ca" / "ca.key").unlink()
    check_refused(
        place,
        ["renew", "-o", "keys", "--within", "400"],
        r"keys/ca/ca\.key: is not here \(kept offline\?\), and a server certificate needs it; bring it back",
    )


def test_a_disk_that_cannot_be_written_is_one_line(place, monkeypatch):
    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    check_refused(
        place,
        MAKE,
        r"cannot write keys: Permission denied; free space, check permissions, or choose another place",
        code=3,
    )


def test_a_machine_without_cryptography_is_one_line(place, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for name in [
        name for name in sys.modules if name == "fedtune.provision" or name.startswith("fedtune.provision.")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("fedtune.provision")
    check_refused(
        place, MAKE, r"fedtune provision needs the package cryptography; install fedtune\[server\]", code=3
    )


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["renew"], "Missing option '-o'"),
        (["show"], "Missing option '-o'"),
        (["renue"], "No such command 'renue'"),
        (["--devices", "two"], "'two' is not a valid integer"),
    ],
)
def test_a_wrong_option_points_to_help(arguments, expected):
    done = invoke(arguments)
    assert done.exit_code == 2 and expected in done.stderr and "--help" in done.stderr


@pytest.mark.parametrize("sub", ["", "renew", "show"])
def test_help_shows_an_example(sub):
    shown = " ".join(said(*sub.split(), "--help").split())
    assert re.search(rf"Examples?: fedtune provision {sub}", shown) and "-o keys" in shown


def test_defaults_are_those_of_the_library():
    def defaults(call, names):
        return [inspect.signature(call).parameters[name].default for name in names]

    assert defaults(provision.command, ["days", "ca_days"]) == defaults(library.make, ["days", "ca_days"])
    assert defaults(provision.renew, ["within", "days"]) == defaults(library.renew, ["within", "days"])


def test_importing_the_command_brings_no_cryptography():
    code = (
        "import sys, fedtune.cli.provision; print([m for m in ('cryptography', 'flwr', "
        "'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
