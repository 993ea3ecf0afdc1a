"""Devices and strangers that mean harm, against a coordinator and honest devices that are real processes."""

import base64
import contextlib
import re
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pytest
from hostile_device import ATTACKS, LANES
from live_federation import DOMAINS, Federation, until

from fedtune import provision
from fedtune.job import parse_job
from fedtune.runs.folder import open_run

pytestmark = pytest.mark.slow
# some pass until the hostile devices are there, and they take part in those that are left
ROUNDS = ATTACKS + 5
DEADLINE = 20.0
GROWTH = 60 * 2**20  # bytes that the coordinator may grow by while it is attacked
SETTINGS = (f"federation.rounds={ROUNDS}", f"evaluation.every={ROUNDS}")


def test_hostile_devices_and_strangers_change_nothing(
    federation, domain_csv, live_settings, make_bundle, run_rounds, tmp_path
):
    """Three of six devices send something else that is wrong in each round, one more never answers an
    offer, and strangers are at the port.
    """
    live: Federation = federation([*DOMAINS, *LANES, "victor"])
    bundle, gate = (
        make_bundle(*SETTINGS, "federation.cohort=6", f"federation.deadline={DEADLINE}"),
        tmp_path / "gate",
    )
    server = live.server(bundle)
    hostile = live.start(
        "hostile_device",
        f"{live.host}:{live.port}",
        str(live.keys / "devices"),
        str(bundle),
        str(gate),
        name="hostile",
        prefix=("env", f"PYTHONPATH={Path(__file__).parent}"),
    )
    for name, data in domain_csv.items():
        live.client(name, data)
    server.wait_for(f"round 1/{ROUNDS}")
    gate.touch()
    until(
        lambda: "attack 0" in hostile.text or "Traceback" in hostile.text,
        "first attack",
        lambda: hostile.text + server.text,
    )
    before = psutil.Process(server.process.pid).memory_info().rss
    with strangers(live):
        assert_closed(live)
        until(
            lambda: hostile.text.count(f"attack {ATTACKS - 1}") == len(LANES) or "Traceback" in hostile.text,
            "last attack",
            lambda: hostile.text + server.text,
        )
        after = psutil.Process(server.process.pid).memory_info().rss
        assert server.wait() == 0, server.text
    assert after < before + GROWTH, f"{before:,} bytes before, {after:,} after"

    run = open_run(live.run())
    lines = run.metrics()
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1))
    made = 0
    for line in lines[1:]:
        due = re.findall(rf"(\w+): round {line['round']}: attack (\d+)", hostile.text)
        assert set(line["clients"]) >= set(DOMAINS) and line["refused"].keys() == {name for name, _ in due}, (
            line
        )
        for name, number in due:
            (attack, (_, reason)), said = list(LANES[name].items())[int(number)], line["refused"][name]
            assert said.startswith(reason), (attack, said)
            assert len(said) < 300 and said.isprintable() and f"{name}: {said}" in server.text, (attack, said)
            made += 1
    assert made == len(LANES) * ATTACKS
    assert sorted(lines[-1]["clients"]) == sorted([*DOMAINS, *LANES])  # nobody is shut out for ever
    assert "first reply taken: True, second: False" in hostile.text, hostile.text
    assert (
        "another name: True" in hostile.text
        and "messages could not be sent" in server.text
        and "Traceback" not in hostile.text
    ), hostile.text
    # as many of its tricks as there was time for
    said = re.findall(r"device victor refused: (.*)", server.text)
    assert (
        len(said) >= 2
        and all(reason.isprintable() for reason in said)
        and "device victor ready" not in server.text
    ), server.text
    assert (
        not any(character in server.text for character in "\x1b\x07\u202e") and "Traceback" not in server.text
    )

    # the honest devices alone
    simulated = run_rounds(
        parse_job("", ["simulation.engine=serial", *live_settings, *SETTINGS]), tmp_path / "simulated"
    ).run
    ours = run.newest().state.arrays
    for name, array in simulated.newest().state.arrays.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-5, rtol=0)


@contextlib.contextmanager
def strangers(live: Federation) -> Iterator[None]:
    """Connections that are opened and then say nothing, or a byte now and then, all along."""
    context = ssl._create_unverified_context()
    plain = [socket.create_connection((live.host, live.port)) for _ in range(40)]
    wrapped = [context.wrap_socket(socket.create_connection((live.host, live.port))) for _ in range(20)]
    for connection in wrapped:
        connection.sendall(
            b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        )
    yield
    for connection in [*plain, *wrapped]:
        connection.close()


CLOSED = (
    "/v1/control/start-run",
    "/v1/control/list-runs",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/v1/runtime/push-messages",
    "/docs",
    "/openapi.json",
    "/health",
    "/",
    "*",
    "//v1/control/list-runs",
    "/V1/FLEET/pull-messages",
    "/v1/fleet",
    "/v1//fleet/pull-messages",
    "/x/../v1/control/list-runs",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol%2flist-runs",
    "/v1/fleet/..\\control\\list-runs",
    "/v1/fleet/;/../../control/list-runs",
    "/v1%2fcontrol/list-runs",
    "/v1/fleet/%00/../control/list-runs",
    "http://x/v1/control/list-runs",
)
FLEET_CALLS = (
    "register-node",
    "activate-node",
    "deactivate-node",
    "unregister-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
PROTOBUF = {"Content-Type": "application/protobuf"}


def assert_closed(live: Federation) -> None:
    """Whoever has no key gets no further than the door, whatever the request looks like."""
    # even if a device's public key is known
    key = base64.b64encode(provision.load_devices(live.home / "devices")["books"]).decode()
    named = {
        "flwr-public-key": key,
        "flwr-timestamp": datetime.now(UTC).isoformat(),
        "flwr-signature": "AAAA",
    }
    for path in CLOSED:
        assert ask(live, "POST", path, PROTOBUF)[0] in (400, 401, 404), path
        for method in ("GET", "POST"):
            assert ask(live, method, path, PROTOBUF | named)[0] in (400, 404), (method, path)
    for call in FLEET_CALLS:
        # some frameworks read the path out of the host
        for host in ("x", "x/v1/runtime/push-object?", "x/v1/control/list-runs#"):
            for who in ({}, named):
                assert ask(live, "POST", f"/v1/fleet/{call}", PROTOBUF | who | {"Host": host})[0] in (
                    400,
                    401,
                    412,
                ), (call, host)
        assert ask(live, "GET", f"/v1/fleet/{call}", named)[0] == 405, call
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "x" * 22 + "==",
    }
    assert ask(live, "GET", "/v1/fleet/pull-messages", upgrade)[0] in (401, 403)

    begun = time.monotonic()
    for length in (str(10**10), "-1", "1e9", "9" * 5000, "1, 10000000000"):
        assert ask(live, "POST", "/v1/fleet/push-object", PROTOBUF | {"Content-Length": length}, b"x")[0] in (
            400,
            401,
        ), length
        assert ask(
            live, "POST", "/v1/fleet/push-object", PROTOBUF | named | {"Content-Length": length}, b"x"
        )[0] in (400, 413), length
    assert time.monotonic() - begun < 10
    assert (endless(live, {}), endless(live, named)) == (401, 413)
    assert ask(live, "POST", "/v1/fleet/push-object", {f"x{i}": "y" * 1000 for i in range(200)})[0] in (
        0,
        400,
        401,
        431,
    )

    with connect(live, tls=False) as connection:  # neither TLS nor HTTP
        connection.sendall(b"\x16\x03\x01" + bytes(range(256)) * 40)
        assert b"HTTP" not in rest(connection)
    with connect(live, tls=False) as connection:
        connection.sendall(b"GET /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in rest(connection)
    with connect(live) as connection:
        connection.sendall(bytes(range(256)) * 400)
        assert b" 400 " in rest(connection)[:20]


def connect(live: Federation, tls: bool = True) -> socket.socket:
    plain = socket.create_connection((live.host, live.port), 20)
    return ssl._create_unverified_context().wrap_socket(plain) if tls else plain


def ask(
    live: Federation, method: str, path: str, headers: dict[str, str], body: bytes = b""
) -> tuple[int, bytes]:
    """The status and all that came back, of a request sent as it is written here;
    status 0 when there was no answer.
    """
    lines = [
        f"{method} {path} HTTP/1.1",
        *(
            f"{k}: {v}"
            for k, v in (
                {"Host": "x", "Content-Length": str(len(body)), "Connection": "close"} | headers
            ).items()
        ),
    ]
    with connect(live) as connection:
        with contextlib.suppress(OSError):
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        answer = rest(connection)
    return (int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0), answer


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side hangs up."""
    found = b""
    with contextlib.suppress(OSError):
        while len(found) < 2**20 and (more := connection.recv(2**16)):
            found += more
    return found


def endless(live: Federation, headers: dict[str, str]) -> int:
    """The answer to a body without a length, before it ends."""
    lines = [
        "POST /v1/fleet/push-object HTTP/1.1",
        *(
            f"{k}: {v}"
            for k, v in (PROTOBUF | {"Host": "x", "Transfer-Encoding": "chunked"} | headers).items()
        ),
    ]
    with connect(live) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        for _ in range(40):
            connection.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")
        return int(connection.recv(20).split()[1])
