"""Who may talk to whom: keys, certificates, plain text, ports, and what is said when it may not be.

No trainer is started where it can be helped.
"""

import contextlib
import csv
import json
import shutil
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from live_federation import Federation, Process, free_port, until

from fedtune import provision

pytestmark = pytest.mark.slow
SECRET = "hush-hush-label"
NAMES = ("alpha", "beta", "gamma")


@pytest.fixture(scope="module")
def bundle(make_bundle) -> Path:
    # waits for ever: nothing is to be trained here
    return make_bundle("federation.rounds=1", "federation.cohort=9", "federation.min-replies=9")


@pytest.fixture(scope="module")
def service(tmp_path_factory, bundle):
    """A coordinator that waits for devices."""
    federation = Federation(tmp_path_factory.mktemp("access"), NAMES)
    federation.coordinator = federation.server(bundle)
    yield federation
    assert federation.coordinator.running, federation.coordinator.text
    assert "Traceback" not in federation.coordinator.text
    federation.close()


def ended(process: Process, code: int) -> str:
    """Its one line on standard error, after it ended by itself with this code."""
    assert process.wait() == code, process.text
    lines = [line for line in process.text.splitlines() if line.startswith("fedtune: ")]
    assert len(lines) == 1 and "Traceback" not in process.text, process.text
    return lines[0]


def device(folder: Path, of: Path) -> Path:
    """A copy of a device folder."""
    return shutil.copytree(of, folder, ignore=shutil.ignore_patterns(".lock", "node"))


def client(service: Federation, folder: Path, data: Path, *arguments: str, server: str = "") -> Process:
    return service.start(
        "fedtune.cli.main",
        "client",
        "--server",
        server or f"{service.host}:{service.port}",
        "--dir",
        str(folder),
        "--data",
        str(data),
        *arguments,
        name=f"{folder.name}-{len(service.processes)}",
    )


def test_certificates_that_are_not_trusted(service, domain_csv, tmp_path):
    """Each is refused by the device, before it says anything about itself."""
    service.coordinator.wait_for("waiting for devices")
    own, data = service.keys / "devices" / "alpha", domain_csv["books"]
    provision.make(tmp_path / "other", ["127.0.0.1"], ["alpha"])
    other = device(tmp_path / "other-ca", own)
    shutil.copy(tmp_path / "other" / "devices" / "alpha" / "ca.crt", other / "ca.crt")
    broken = device(tmp_path / "broken-ca", own)
    (broken / "ca.crt").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    tries = [
        (client(service, other, data), "was not signed by the authority in"),
        (client(service, broken, data), "cannot be used as the coordinator's authority"),
    ]

    for name, host, now, words in (
        ("expired", "127.0.0.1", datetime.now(UTC) - timedelta(days=400), "has expired; renew it"),
        ("early", "127.0.0.1", datetime.now(UTC) + timedelta(days=40), "is not valid yet"),
        # a certificate holds 127.0.0.1 whatever else it holds
        ("elsewhere", "127.0.0.2", None, "is for other hosts"),
    ):
        provision.make(tmp_path / name, ["127.0.0.1"], ["alpha"], ca_days=3000, now=now)
        address = listening(host, tmp_path / name / "server")
        tries.append((client(service, tmp_path / name / "devices" / "alpha", data, server=address), words))
    for process, words in tries:
        # time mends these: it does not join, and tries again
        if "expired" in words or "not valid yet" in words:
            process.wait_for(words)
            process.wait_for("trying again")
            assert process.running and process.stop() == 130
        else:
            assert words in ended(process, 2), words


def listening(host: str, keys: Path) -> str:
    """Address of somebody who shakes hands with this server certificate, and says nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server.crt", keys / "server.key")
    port = free_port()

    def serve() -> None:
        with socket.create_server((host, port)) as listener:
            while True:
                plain, _ = listener.accept()
                with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True):
                    pass

    threading.Thread(target=serve, daemon=True).start()
    return f"{host}:{port}"


def wait_until_it_listens(process: Process, host: str, port: int) -> None:
    def listens() -> bool:
        with contextlib.closing(socket.socket()) as s:
            return s.connect_ex((host, port)) == 0

    until(lambda: listens() or not process.running, "listening", lambda: process.text)


def test_plain_text_and_loopback(service, bundle, domain_csv, tmp_path):
    own, data = service.keys / "devices" / "alpha", domain_csv["books"]
    port = free_port()
    plain = service.start(
        "fedtune.cli.main",
        "server",
        str(bundle),
        "--insecure",
        "--dir",
        str(tmp_path / "plain"),
        "--address",
        f"127.0.0.1:{port}",
        name="plain",
    )
    taken = service.start(
        "fedtune.cli.main",
        "server",
        str(bundle),
        "--insecure",
        "--dir",
        str(tmp_path / "taken"),
        "--address",
        f"127.0.0.1:{service.port}",
        name="taken",
    )
    outside = [
        service.start(
            "fedtune.cli.main",
            "server",
            str(bundle),
            "--insecure",
            "--dir",
            str(tmp_path / "outside"),
            "--address",
            address,
            name=f"outside-{number}",
        )
        for number, address in enumerate(("0.0.0.0:9092", "[::]:9092"))
    ]
    outside.append(client(service, tmp_path / "away", data, "--insecure", server="192.0.2.1:9092"))
    wait_until_it_listens(plain, "127.0.0.1", port)
    mute = client(service, tmp_path / "mute", data, "--insecure")  # plain text to the TLS port
    assert "does not speak TLS" in ended(client(service, own, data, server=f"127.0.0.1:{port}"), 2)
    for process in outside:
        assert "can do without TLS" in ended(process, 2)
    assert f"cannot listen on 127.0.0.1:{service.port}" in ended(taken, 3)
    mute.wait_for("connecting to")
    assert mute.running and "ready" not in mute.text
    mute.kill()
    assert "node-" not in service.coordinator.text


def test_keys(service, domain_csv, tmp_path):
    """Unknown, broken, shut out while the coordinator runs, let in while it runs, and used twice."""
    home, data = service.home, domain_csv["books"]
    stranger = provision.make(tmp_path / "stranger", ["127.0.0.1"], ["alpha"]) and device(
        tmp_path / "unknown", tmp_path / "stranger" / "devices" / "alpha"
    )
    shutil.copy(service.keys / "devices" / "alpha" / "ca.crt", stranger / "ca.crt")
    broken = device(tmp_path / "broken", service.keys / "devices" / "alpha")
    (broken / "device.key").write_text(
        "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"
    )
    absent = device(tmp_path / "absent", service.keys / "devices" / "alpha")
    (absent / "device.key").unlink()
    unknown, bad, none = (client(service, folder, data) for folder in (stranger, broken, absent))

    late = provision.make(service.keys, [], ["delta"]) and service.keys / "devices" / "delta"
    policy = 'allowed-tasks = ["image-classification"]\n'  # enough of an answer, and no trainer for it
    for folder in (service.keys / "devices" / "gamma", late):
        (folder / "policy.toml").write_text(policy)
    gamma, delta = client(service, service.keys / "devices" / "gamma", data), client(service, late, data)
    twice = None
    service.coordinator.wait_for("device gamma refused: policy: ")
    twice = client(service, service.keys / "devices" / "gamma", data)
    assert "another client runs with this folder" in ended(twice, 2)
    service.coordinator.wait_for("device delta refused: policy: ")

    assert "does not know this device's key" in ended(unknown, 2)
    assert "is not a device key" in ended(bad, 2)
    assert "device.key: is missing" in ended(none, 2)

    # the same key from two places: both are the device delta
    copy = client(service, device(tmp_path / "copy", late), data)
    copy.wait_for("connecting to")
    (home / "devices" / "gamma.pub").unlink()
    assert "does not know this device's key" in ended(gamma, 2)
    service.coordinator.wait_for("device gamma is no longer let in")
    assert delta.running and copy.running
    family = [p for d in (delta, copy) for p in psutil.Process(d.process.pid).children(recursive=True)]
    for process in (delta, copy):
        assert process.stop() == 130
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)


def test_data_errors_stay_on_the_device(service, domain_csv, tmp_path):
    rows = list(csv.DictReader(domain_csv["books"].read_text().splitlines()))
    with (tmp_path / "label.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, rows[0].keys())
        out.writeheader()
        out.writerows(row | {"label": SECRET} for row in rows)
    (tmp_path / "folder").mkdir()
    # the others are tested where data are read
    wrong = {"label": (tmp_path / "label.csv", SECRET), "folder": (tmp_path / "folder", "is a folder")}

    provision.make(service.keys, [], list(wrong))
    started = {
        name: client(service, service.keys / "devices" / name, path) for name, (path, _) in wrong.items()
    }
    for name, process in started.items():
        line = ended(process, 2)
        assert "--data" in line and wrong[name][1] in line, line
        service.coordinator.wait_for(
            f"device {name} refused: data: what this device reads does not fit the job"
        )
    status = json.loads((service.home / "service.json").read_text())
    assert {d["name"]: d["state"] for d in status["devices"] if d["name"] in wrong} == dict.fromkeys(
        wrong, "refused"
    )
    for path in [service.coordinator.log, *(p for p in service.home.rglob("*") if p.is_file())]:
        assert SECRET.encode() not in path.read_bytes(), path
