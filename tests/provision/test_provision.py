"""Provisioning: certificates a strict peer accepts, keys nobody else can read, nothing overwritten
unasked, nothing left half done.
"""

import fcntl
import ipaddress
import os
import shutil
import ssl
import stat
import subprocess
from argparse import Namespace
from concurrent import futures
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import EnvironmentProblem, UserError
from fedtune.provision import check_host, device_names, inspect, load_devices, make, renew, sans
from fedtune.provision.certificates import issue_ca, issue_server

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
HOSTS = ("fed.example.org", "192.0.2.7", "2001:db8::1")
TWO = ("device-001", "device-002")
KEYS = ("ca/ca.key", "server/server.key", "devices/device-001/device.key", "devices/device-002/device.key")
OPEN = (
    "ca/ca.crt",
    "server/ca.crt",
    "server/server.crt",
    "devices/device-001/ca.crt",
    "devices/device-002/ca.crt",
    "server/devices/device-001.pub",
    "server/devices/device-002.pub",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two devices, made once; tests that change something take `root`."""
    root = tmp_path_factory.mktemp("provision") / "made"
    make(root, HOSTS, TWO)
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "keys")


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def handshake(ca, server, host):
    """A TLS handshake in memory: the device trusts `ca`, the coordinator has the folder `server`.

    Raises ssl.SSLError when one refuses.
    """
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(server / "server.crt", server / "server.key")
    asking = ssl.create_default_context(cafile=str(ca))
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [asking.wrap_bio(down, up, server_hostname=host), accepting.wrap_bio(up, down, server_side=True)]
    for _ in range(10):
        waiting = []
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waiting.append(end)
        ends = waiting
    assert not ends


def check_whole(root, names, now=None):
    """Everything there, everything belonging together, no leftovers, and no more rights than needed."""
    files = content(root)
    wanted = {"ca/ca.key", "ca/ca.crt", "server/ca.crt", "server/server.crt", "server/server.key"}
    for name in names:
        wanted |= {f"devices/{name}/device.key", f"devices/{name}/ca.crt", f"server/devices/{name}.pub"}
    assert files.keys() == wanted
    assert len({files[name] for name in wanted if name.endswith("ca.crt")}) == 1
    enrolled = load_devices(root / "server" / "devices")
    assert enrolled.keys() == set(names)
    for name in names:
        key = serialization.load_ssh_private_key(files[f"devices/{name}/device.key"], None)
        assert public_key_to_bytes(key.public_key()) == enrolled[name]
    for path in root.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600 if path.suffix == ".key" else 0o644), path
    handshake(root / "ca" / "ca.crt", root / "server", "localhost")


def refused(expected, call, *arguments, error=UserError, **options):
    with pytest.raises(error, match=expected) as caught:
        call(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert type(caught.value) is error


# Certificates


@pytest.mark.parametrize("host", [*HOSTS, "localhost", "127.0.0.1", "::1"])
def test_a_strict_client_accepts_every_host(host, made):
    handshake(made / "devices" / "device-001" / "ca.crt", made / "server", host)


@pytest.mark.parametrize("host", ["example.org", "other.fed.example.org", "192.0.2.8", "::2"])
def test_another_host_is_refused(host, made):
    with pytest.raises(ssl.SSLCertVerificationError, match=r"[Mm]ismatch|not valid for"):
        handshake(made / "ca" / "ca.crt", made / "server", host)


def test_another_ca_is_refused(made, tmp_path):
    make(tmp_path / "other", HOSTS, TWO)
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        handshake(tmp_path / "other" / "ca" / "ca.crt", made / "server", "localhost")


def test_an_expired_certificate_is_refused(tmp_path):
    make(tmp_path, HOSTS, TWO, days=100, ca_days=1000, now=NOW - 101 * DAY)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(tmp_path / "ca" / "ca.crt", tmp_path / "server", "localhost")


def test_a_device_whose_clock_is_a_little_behind_accepts(tmp_path):
    make(tmp_path, HOSTS, TWO, now=NOW + timedelta(minutes=5))
    handshake(tmp_path / "ca" / "ca.crt", tmp_path / "server", "localhost")


@pytest.mark.parametrize("host", ["localhost", "fed.example.org"])
def test_grpc_accepts(host, made):
    server = grpc.server(futures.ThreadPoolExecutor(1))
    folder = made / "server"
    port = server.add_secure_port(
        "127.0.0.1:0",
        grpc.ssl_server_credentials(
            [((folder / "server.key").read_bytes(), (folder / "server.crt").read_bytes())]
        ),
    )
    server.start()
    trust = grpc.ssl_channel_credentials((made / "devices" / "device-002" / "ca.crt").read_bytes())
    with grpc.secure_channel(
        f"127.0.0.1:{port}", trust, [("grpc.ssl_target_name_override", host)]
    ) as channel:
        grpc.channel_ready_future(channel).result(timeout=20)
    server.stop(None).wait()


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
@pytest.mark.parametrize(
    "check",
    [
        ["-verify_hostname", "fed.example.org"],
        ["-verify_ip", "192.0.2.7"],
        ["-verify_ip", "2001:db8::1"],
        ["-verify_ip", "127.0.0.1"],
    ],
)
def test_openssl_accepts_strictly(check, made):
    done = subprocess.run(
        [
            "openssl",
            "verify",
            "-x509_strict",
            "-purpose",
            "sslserver",
            "-check_ss_sig",
            "-CAfile",
            made / "ca" / "ca.crt",
            *check,
            made / "server" / "server.crt",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_dates_serials_and_uses(tmp_path):
    make(tmp_path, HOSTS, TWO, days=10, ca_days=20, now=NOW)
    ca, server = certificate(tmp_path / "ca" / "ca.crt"), certificate(tmp_path / "server" / "server.crt")
    assert (server.not_valid_after_utc, ca.not_valid_after_utc) == (NOW + 10 * DAY, NOW + 20 * DAY)
    assert timedelta(minutes=2) < NOW - server.not_valid_before_utc < timedelta(hours=1)
    assert ca.serial_number != server.serial_number and min(ca.serial_number, server.serial_number) > 2**64
    assert [
        x.critical
        for x in (
            ca.extensions.get_extension_for_class(x509.BasicConstraints),
            ca.extensions.get_extension_for_class(x509.KeyUsage),
        )
    ] == [True, True]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        x509.ExtendedKeyUsageOID.SERVER_AUTH
    ]


def test_the_server_certificate_never_outlives_the_ca(tmp_path):
    make(tmp_path, HOSTS, TWO, days=100, ca_days=200, now=NOW - 80 * DAY)
    renew(tmp_path, within=30, days=365, now=NOW)
    assert (
        certificate(tmp_path / "server" / "server.crt").not_valid_after_utc
        == certificate(tmp_path / "ca" / "ca.crt").not_valid_after_utc
        == NOW + 120 * DAY
    )


# Keys


def test_flower_takes_the_keys(made):
    for name in TWO:
        path = made / "devices" / name / "device.key"
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
        asked = Namespace(auth_supernode_private_key=str(path), auth_supernode_public_key=None)
        assert (
            _try_setup_client_authentication(asked)[1].public_numbers() == key.public_key().public_numbers()
        )
        assert (
            isinstance(key, ec.EllipticCurvePrivateKey)
            and isinstance(key.curve, ec.SECP384R1)
            and uses_nist_ec_curve(key.public_key())
        )
        line = (made / "server" / "devices" / f"{name}.pub").read_bytes()
        assert serialization.load_ssh_public_key(line).public_numbers() == key.public_key().public_numbers()
        assert (
            line.split()[0] == b"ecdsa-sha2-nistp384"
            and line.endswith(f" {name}\n".encode())
            and line.count(b"\n") == 1
        )


def test_keys_of_ca_and_server_are_p256(made):
    for path in ("ca/ca.key", "server/server.key"):
        assert isinstance(
            serialization.load_pem_private_key((made / path).read_bytes(), None).curve, ec.SECP256R1
        )


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_permissions_do_not_depend_on_the_umask(umask, tmp_path, monkeypatch):
    """Also at the instant of creation: the bits os.open is called with,
    and those a file has when the first byte goes in.
    """
    seen = []
    sync = os.fsync

    def recording(fd):
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode):
            seen.append(stat.S_IMODE(found.st_mode))
        sync(fd)

    opened = []
    real_open = os.open

    def opening(path, flags, mode=0o777, **more):
        if flags & os.O_CREAT:
            opened.append(mode)
        return real_open(path, flags, mode, **more)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(os, "open", opening)
    old = os.umask(umask)
    try:
        make(tmp_path / "deep" / "keys", HOSTS, TWO)
    finally:
        os.umask(old)
    check_whole(tmp_path / "deep" / "keys", TWO)
    assert set(opened) == {0o600} and set(seen) == {0o600, 0o644} and seen.count(0o600) == len(KEYS)
    assert stat.S_IMODE((tmp_path / "deep").stat().st_mode) == 0o700


def test_a_folder_that_is_there_is_closed_before_a_key_goes_in(tmp_path):
    (tmp_path / "server").mkdir()
    (tmp_path / "server").chmod(0o755)
    (tmp_path / "server" / "notes.txt").write_text("mine")
    tmp_path.chmod(0o755)
    make(tmp_path, HOSTS, TWO)
    assert (
        stat.S_IMODE((tmp_path / "server").stat().st_mode) == 0o700
        and stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    )
    assert (tmp_path / "server" / "notes.txt").read_text() == "mine"


# Adding, forcing, finishing


def test_more_devices_leave_everything_else_alone(root):
    before = content(root)
    report = make(root, HOSTS, (*TWO, "device-003", "Lab.7_b"))
    after = content(root)
    assert {name: after[name] for name in before} == before
    check_whole(root, (*TWO, "device-003", "Lab.7_b"))
    assert [item.name for item in report.made] == ["device-003", "Lab.7_b"]
    assert [item.name for item in report.kept] == ["CA", "server", *TWO]
    assert any(f"copy {root}/server/devices to the coordinator" in line for line in report.todo)


def test_the_same_again_changes_nothing(root):
    before = content(root)
    report = make(root, HOSTS, TWO)
    assert content(root) == before and not report.made and not report.todo


def test_hosts_need_not_be_said_again(root):
    report = make(root, (), ("device-003",))
    assert report.hosts == (*HOSTS, "localhost", "127.0.0.1", "::1")
    check_whole(root, (*TWO, "device-003"))


def test_the_order_of_hosts_does_not_matter(root):
    make(root, (*reversed(HOSTS), "FED.example.org", "localhost"), ("device-003",))
    check_whole(root, (*TWO, "device-003"))


def test_devices_are_added_while_the_ca_is_kept_offline(root):
    shutil.rmtree(root / "ca")
    before = content(root)
    make(root, HOSTS, ("device-003",))
    after = content(root)
    assert {name: after[name] for name in before} == before and not (root / "ca").exists()
    assert after["devices/device-003/ca.crt"] == after["server/ca.crt"]
    assert load_devices(root / "server" / "devices").keys() == {*TWO, "device-003"}


@pytest.mark.parametrize(
    "gone", [["devices/device-001"], ["server/server.key"], ["devices/device-001/device.key"]]
)
def test_what_was_delivered_is_not_made_again(gone, root):
    for name in gone:
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
    before = content(root)
    report = make(root, HOSTS, TWO)
    assert content(root) == before and not report.made


def test_force_makes_everything_new(root):
    before = content(root)
    report = make(root, ("new.example.org",), ("device-001", "device-009"), force=True)
    check_whole(root, ("device-001", "device-009"))
    after = content(root)
    assert not any(after.get(name) == data for name, data in before.items())
    assert report.removed == ("device-002",) and not (root / "devices" / "device-002").exists()
    assert any("in place of the old one" in line for line in report.todo)


def test_force_leaves_what_is_not_its_own(root):
    (root / "devices" / "device-002" / "notes.txt").write_text("mine")
    make(root, HOSTS, ("device-001",), force=True)
    assert [path.name for path in (root / "devices" / "device-002").iterdir()] == ["notes.txt"]


def crash_after(count, monkeypatch):
    """os.replace works `count` times and then the machine stops."""
    real, left = os.replace, [count]

    def replace(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(*arguments)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("count", range(11))
def test_an_interrupted_call_is_finished_by_the_next(count, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_after(count, patch)
        make(tmp_path, HOSTS, TWO)
    before = content(tmp_path)
    assert len(before) == count
    make(tmp_path, HOSTS, TWO)
    assert {name: content(tmp_path)[name] for name in before} == before
    tmp_path.chmod(0o700)
    check_whole(tmp_path, TWO)


@pytest.mark.parametrize("count", range(0, 12, 2))
def test_an_interrupted_force_is_finished_by_the_next(count, root, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_after(count, patch)
        make(root, HOSTS, (*TWO, "device-003"), force=True)
    make(root, HOSTS, (*TWO, "device-003"), force=True)
    check_whole(root, (*TWO, "device-003"))


@pytest.mark.parametrize(
    "gone",
    [
        ["ca/ca.crt"],
        ["server/ca.crt"],
        ["ca/ca.crt", "server/ca.crt"],
        ["server/server.crt"],
        ["server/server.crt", "server/server.key"],
        ["devices/device-002/ca.crt"],
        ["server/devices/device-002.pub"],
        ["devices/device-002/device.key", "server/devices/device-002.pub"],
    ],
)
def test_what_is_missing_is_made_again(gone, root):
    before = content(root)
    for name in gone:
        (root / name).unlink()
    make(root, HOSTS, TWO)
    keys = [name for name in KEYS if name not in gone]
    assert {name: content(root)[name] for name in keys} == {name: before[name] for name in keys}
    handshake(root / "server" / "ca.crt", root / "server", "localhost")
    handshake(root / "devices" / "device-001" / "ca.crt", root / "server", "localhost")
    check_whole(root, TWO)


def test_a_part_left_by_a_killed_call_goes(root):
    (root / "server" / "server.key").unlink()
    (root / "server" / "server.crt").unlink()
    (root / "server" / ".server.key.part").write_bytes(b"half a key")
    make(root, HOSTS, TWO)
    check_whole(root, TWO)


def test_a_full_disk_leaves_no_part(root, monkeypatch):
    (root / "devices" / "new").mkdir()
    before = content(root)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(
        r"cannot write .*device\.key: No space left on device; free space",
        make,
        root,
        (),
        ("new",),
        error=EnvironmentProblem,
    )
    assert content(root) == before


# Renewing


def test_what_is_not_due_stays(root):
    before = content(root)
    report = renew(root)
    assert content(root) == before
    assert not report.made and not report.todo and [item.name for item in report.kept] == ["CA", "server"]


def test_a_server_certificate_that_is_due_is_replaced_alone(tmp_path):
    make(tmp_path, HOSTS, TWO, days=100, now=NOW - 75 * DAY)
    before = content(tmp_path)
    assert not renew(tmp_path, within=24, now=NOW).made
    report = renew(tmp_path, within=25, days=50, now=NOW)
    after = content(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {
        "server/server.crt",
        "server/server.key",
    }
    assert certificate(tmp_path / "server" / "server.crt").not_valid_after_utc == NOW + 50 * DAY
    assert [item.name for item in report.made] == ["server"] and report.hosts == (
        *HOSTS,
        "localhost",
        "127.0.0.1",
        "::1",
    )
    assert report.todo == (f"copy {tmp_path}/server to the coordinator and restart it",)
    tmp_path.chmod(0o700)
    check_whole(tmp_path, TWO)


def test_other_hosts_are_a_reason_to_renew(root):
    assert not renew(root, hosts=HOSTS).made
    assert renew(root, hosts=("new.example.org",)).hosts[0] == "new.example.org"
    handshake(root / "ca" / "ca.crt", root / "server", "new.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(root / "ca" / "ca.crt", root / "server", "fed.example.org")
    check_whole(root, TWO)


def test_a_renewed_ca_and_the_old_one_work_side_by_side(tmp_path):
    root, old = tmp_path / "keys", tmp_path / "old"
    make(root, HOSTS, TWO, days=365, ca_days=1825, now=NOW - 1805 * DAY)
    renew(root, within=30, now=NOW - 100 * DAY)  # the server's alone, cut short where the CA ends
    shutil.copytree(root, old)
    report = renew(root, within=30, now=NOW)
    assert [item.name for item in report.made] == ["CA", "server"]
    assert report.todo[0] == (
        f"every device needs the new ca.crt: copy {root}/server/ca.crt to each, "
        f"before {NOW + 20 * DAY:%Y-%m-%d}; until then the old and the new one both work"
    )
    before, after = content(old), content(root)
    assert {name for name in after if after[name] == before[name]} == {
        "ca/ca.key",
        "devices/device-001/device.key",
        "devices/device-002/device.key",
        "server/devices/device-001.pub",
        "server/devices/device-002.pub",
    }
    for trusting in (old, root):
        for serving in (old, root):
            handshake(trusting / "devices" / "device-001" / "ca.crt", serving / "server", "localhost")
    assert certificate(root / "ca" / "ca.crt").not_valid_after_utc == NOW + 1825 * DAY
    check_whole(root, TWO)


def test_an_expired_ca_says_that_devices_are_cut_off(tmp_path):
    make(tmp_path, HOSTS, TWO, days=10, ca_days=20, now=NOW - 25 * DAY)
    refused(r"ca\.crt: expired on \d{4}-\d\d-\d\d; renew it with", _without_server, tmp_path)
    report = renew(tmp_path, hosts=HOSTS, now=NOW)
    assert (
        f"now: the old one expired on {NOW - 5 * DAY:%Y-%m-%d}, and a device that has it cannot connect"
        in report.todo[0]
    )
    tmp_path.chmod(0o700)
    check_whole(tmp_path, TWO)


def _without_server(root):
    (root / "server" / "server.crt").unlink()
    make(root, HOSTS, TWO)


@pytest.mark.parametrize("count", range(6))
def test_an_interrupted_renewal_is_finished_by_the_next(count, tmp_path, monkeypatch):
    make(tmp_path, HOSTS, TWO, days=10, ca_days=20, now=NOW - 5 * DAY)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_after(count, patch)
        renew(tmp_path, now=NOW)
    report = renew(tmp_path, now=NOW)
    assert [item.name for item in report.made] == (["CA", "server"] if count < 4 else ["server"])
    tmp_path.chmod(0o700)
    check_whole(tmp_path, TWO)


def test_a_key_without_its_certificate_is_renewed_even_when_not_due(root, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_after(1, patch)
        renew(root, hosts=("new.example.org",))
    refused(
        r"server\.key: does not belong to server\.crt; `fedtune provision renew -o .*` makes both new",
        make,
        root,
        HOSTS,
        TWO,
    )
    assert [item.name for item in renew(root).made] == ["server"]
    check_whole(root, TWO)


@pytest.mark.parametrize("count", range(4))
def test_a_stolen_device_gets_other_keys(count, root, monkeypatch):
    before = content(root)
    shutil.rmtree(root / "ca")  # kept offline: shutting a device out must not wait for it
    if count < 3:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            crash_after(count, patch)
            renew(root, names=("device-002",))
    report = renew(root, names=("device-002",))
    after = content(root)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"devices/device-002/device.key", "server/devices/device-002.pub"}
    assert [item.name for item in report.made] == ["device-002"]
    assert report.todo == (
        f"copy {root}/server/devices to the coordinator, so that it refuses the old key of device-002",
        f"copy {root}/devices/device-002 to device-002, and to no other device",
    )


def test_a_device_whose_folder_was_delivered_can_be_replaced(root):
    shutil.rmtree(root / "devices" / "device-002")
    renew(root, names=("device-002",))
    check_whole(root, TWO)


def test_device_and_hosts_in_one_call(root):
    assert [item.name for item in renew(root, hosts=("new.example.org",), names=("device-001",)).made] == [
        "server",
        "device-001",
    ]
    check_whole(root, TWO)


def test_the_newest_certificate_of_the_ca_counts(tmp_path):
    """A CA folder brought back from an older copy does not undo a renewal."""
    root, offline = tmp_path / "keys", tmp_path / "offline"
    make(root, HOSTS, TWO, days=10, ca_days=20, now=NOW - 5 * DAY)
    shutil.copytree(root / "ca", offline)
    renew(root, now=NOW)
    newest = (root / "server" / "ca.crt").read_bytes()
    shutil.rmtree(root / "ca")
    shutil.copytree(offline, root / "ca")
    make(root, HOSTS, TWO, now=NOW)
    assert (root / "ca" / "ca.crt").read_bytes() == newest
    check_whole(root, TWO)


def test_a_damaged_server_certificate_is_renewed_when_its_hosts_are_given(root):
    (root / "server" / "server.crt").write_bytes(b"none")
    (root / "server" / "server.key").write_bytes(b"none")
    refused(r"server\.crt: not a certificate", renew, root)
    renew(root, hosts=HOSTS)
    check_whole(root, TWO)


# Looking


def test_inspect_lists_everything(tmp_path):
    make(tmp_path, HOSTS, TWO, days=10, ca_days=20, now=NOW)
    ca, server, first, second = inspect(tmp_path)
    assert (ca.kind, ca.path, ca.not_after, ca.has_key) == (
        "ca",
        tmp_path / "ca" / "ca.crt",
        NOW + 20 * DAY,
        True,
    )
    assert (server.kind, server.not_after, server.hosts) == ("server", NOW + 10 * DAY, sans(HOSTS))
    assert [(x.name, x.kind, x.not_after, x.has_key) for x in (first, second)] == [
        (name, "device", None, True) for name in TWO
    ]
    shutil.rmtree(tmp_path / "ca")
    shutil.rmtree(tmp_path / "devices" / "device-001")
    ca, server, first, second = inspect(tmp_path)
    assert (ca.path, ca.has_key, first.path, first.has_key) == (
        tmp_path / "server" / "ca.crt",
        False,
        tmp_path / "server" / "devices" / "device-001.pub",
        False,
    )


def test_inspect_needs_no_key(root):
    before = inspect(root)
    for name in KEYS:
        (root / name).write_bytes(b"none")
    assert inspect(root) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda root: make(root, HOSTS, TWO),
        lambda root: make(root, (), ("new",)),
        renew,
        inspect,
        lambda root: load_devices(root / "server" / "devices"),
    ],
    ids=["make", "add", "renew", "inspect", "load_devices"],
)
def test_a_folder_of_somebody_else_is_one_line(call, root, monkeypatch):
    """What the operating system says to another user, whoever runs the tests."""
    real = os.stat

    def denied(path, *arguments, **options):
        if isinstance(path, os.PathLike | str) and "server" in os.fspath(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", denied)
    refused(
        r"cannot read .*server.*: Permission denied; check permissions", call, root, error=EnvironmentProblem
    )


def test_load_devices(made, tmp_path):
    found = load_devices(made / "server" / "devices")
    assert list(found) == sorted(TWO)
    for name, data in found.items():
        key = serialization.load_ssh_public_key((made / "server" / "devices" / f"{name}.pub").read_bytes())
        assert data == public_key_to_bytes(key)
    assert load_devices(tmp_path) == {}


def public_line(key):
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def certified():
    """An EC public key in an SSH certificate: who signed it is never asked, so it is not taken."""
    key = ec.generate_private_key(ec.SECP384R1())
    made = (
        serialization.SSHCertificateBuilder()
        .public_key(key.public_key())
        .type(serialization.SSHCertificateType.USER)
    )
    return made.valid_for_all_principals().valid_after(0).valid_before(2**40).sign(key).public_bytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"none",
        b"ecdsa-sha2-nistp384 AAAA",
        b"\xff\xfe\x00",
        public_line(ed25519.Ed25519PrivateKey.generate()),
        certified(),
        public_line(rsa.generate_private_key(65537, 2048)),
        b"\n".join(public_line(ec.generate_private_key(ec.SECP384R1())) for _ in range(2)),
        ec.generate_private_key(ec.SECP256K1())
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    ],
    ids=["empty", "text", "cut", "bytes", "ed25519", "certificate", "rsa", "two", "pem"],
)
def test_what_is_no_device_key_is_refused(data, root):
    folder = root / "server" / "devices"
    (folder / "bad.pub").write_bytes(data)
    refused(r"bad\.pub: not one EC public key in OpenSSH form", load_devices, folder)


def test_other_reasons_to_refuse_device_keys(root):
    folder = root / "server" / "devices"
    refused(r"none: not a folder; give the folder of \.pub files", load_devices, root / "none")
    shutil.copy(folder / "device-001.pub", folder / "twin.pub")
    refused(
        r"twin\.pub: holds the same key as device-001\.pub; each device needs its own", load_devices, folder
    )
    (folder / "twin.pub").rename(folder / "._odd name.pub")
    refused(r"'\._odd name' is not a device name", load_devices, folder)
    (folder / "._odd name.pub").rename(folder / "long.pub")
    (folder / "long.pub").write_bytes(b"x" * 70_000)
    refused(r"long\.pub: longer than 65,536 bytes", load_devices, folder)
    (folder / "long.pub").unlink()
    (folder / "folder.pub").mkdir()
    refused(r"folder\.pub: not a plain file", load_devices, folder)


# Arguments


@pytest.mark.parametrize(
    "host, expected",
    [
        ("", "neither a DNS name"),
        (" ", "neither a DNS name"),
        ("two words", "neither a DNS name"),
        ("a\nb", "neither a DNS name"),
        ("_", "neither a DNS name"),
        ("fed_1.example.org", "neither a DNS name"),
        ("-a.example.org", "neither a DNS name"),
        ("example.org.", "neither a DNS name"),
        ("a..b", "neither a DNS name"),
        ("a/b", "neither a DNS name"),
        ("192.0.2", "neither a DNS name"),
        ("192.0.2.256", "neither a DNS name"),
        ("9092", "neither a DNS name"),
        ("1:2:3", "neither a DNS name"),
        ("a" * 64 + ".org", "neither a DNS name"),
        (".".join(["a" * 49] * 6), "has 299 characters; a DNS name has at most 253"),
        ("https://fed.example.org", "is a URL; give the name or address alone"),
        ("fed.example.org:9092", "has a port or brackets; give the name or address alone"),
        ("192.0.2.7:9092", "has a port or brackets"),
        ("[::1]", "has a port or brackets"),
        ("[2001:db8::1]:9092", "has a port or brackets"),
        ("*.example.org", "is a wildcard; give each name"),
        ("fédération.example.org", r"outside ASCII; give the punycode form \(xn--…\)"),
        ("0.0.0.0", "not an address devices can reach"),
        ("::", "not an address devices can reach"),
        ("fe80::1%eth0", "not an address devices can reach"),
        ("224.0.0.1", "not an address devices can reach"),
    ],
)
def test_what_is_no_host_is_refused(host, expected, tmp_path):
    refused(expected, make, tmp_path / "keys", ("fine.example.org", host), TWO)
    refused(expected, renew, tmp_path / "keys", hosts=(host,))
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize(
    "host, canonical",
    [
        ("localhost", "localhost"),
        ("Fed.Example.ORG", "fed.example.org"),
        ("fed", "fed"),
        ("xn--fdration-b1ac.example", "xn--fdration-b1ac.example"),
        ("1a.2b", "1a.2b"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("192.0.2.7", "192.0.2.7"),
        (".".join(["a" * 63] * 3 + ["a" * 61]), ".".join(["a" * 63] * 3 + ["a" * 61])),
    ],
)
def test_hosts_in_canonical_form(host, canonical):
    assert check_host(host) == canonical


LABEL = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
HOST = st.one_of(
    st.lists(LABEL, min_size=1, max_size=4).map(".".join),
    st.ip_addresses().filter(lambda x: not x.is_unspecified and not x.is_multicast).map(str),
)


@settings(deadline=None)
@given(st.lists(HOST, min_size=1, max_size=6), st.randoms())
def test_names_of_a_certificate_are_each_host_once_and_always_this_machine(hosts, draw):
    found = sans(hosts)
    assert len(set(found)) == len(found) and set(found) == {*hosts, "localhost", "127.0.0.1", "::1"}
    assert found[0] == hosts[0] and sans(found) == found
    again = [host.upper() if draw.random() < 0.5 else host for host in hosts for _ in range(2)]
    assert sans(again) == found


@settings(max_examples=25, deadline=None)
@given(st.lists(HOST, min_size=1, max_size=6))
def test_a_certificate_says_names_and_addresses_apart(hosts):
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = issue_ca(ca_key, 10, NOW)
    cert = issue_server(ca_key, ca, key.public_key(), sans(hosts), 5, NOW)
    names = (
        x509.load_der_x509_certificate(cert.public_bytes(serialization.Encoding.DER))
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    addresses = set(names.get_values_for_type(x509.IPAddress))
    assert {str(address) for address in addresses} | set(names.get_values_for_type(x509.DNSName)) == set(
        sans(hosts)
    )
    assert addresses >= {ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")}


@settings(deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_a_host_or_one_line(text):
    try:
        assert check_host(check_host(text)) == check_host(text)
    except UserError as e:
        assert len(str(e).splitlines()) == 1 and len(str(e)) < 500


def test_device_names():
    assert device_names(2) == TWO
    assert device_names(1001)[-2:] == ("device-1000", "device-1001")
    assert device_names(1, ["Lab.7_b-"]) == ("device-001", "Lab.7_b-")
    assert device_names(0, ["a"]) == device_names(None, ["a"]) == ("a",)


@pytest.mark.parametrize(
    "count, extra, expected",
    [
        (None, [], r"^no device: give --devices 1 to 10000, or --device NAME"),
        (0, [], r"^--devices 0: give --devices 1 to 10000, or --device NAME"),
        (-1, ["a"], r"^--devices -1: give 1 to 10000"),
        (10_001, [], r"^--devices 10001: give 1 to 10000"),
        (1, ["device-001"], r"^device name 'device-001': given twice"),
        (
            1,
            ["Device-001"],
            r"^device name 'Device-001': differs from 'device-001' in upper and lower case only",
        ),
        (None, [""], r"^device name '': give letters, digits and"),
        (None, [".hidden"], r"^device name '\.hidden': give letters"),
        (None, ["../up"], r"^device name '\.\./up': give letters"),
        (None, ["two\nlines"], r"^device name 'two\\nlines': give letters"),
        (None, ["é"], r"^device name 'é': give letters"),
        (None, ["x" * 65], r"^device name 'x{60}…': give letters"),
    ],
)
def test_what_is_no_device_is_refused(count, extra, expected):
    refused(expected, device_names, count, extra)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"days": 0}, r"^--days 0: give 1 to 3650"),
        ({"days": -3}, r"^--days -3: give 1 to 3650"),
        ({"days": 3651, "ca_days": 4000}, r"^--days 3651: give 1 to 3650"),
        (
            {"days": 100, "ca_days": 99},
            r"^--ca-days 99: give --days \(100\) to 7300; the server certificate cannot outlive its CA",
        ),
        ({"ca_days": 7301}, r"^--ca-days 7301: give "),
        ({"hosts": ()}, r"^no host: give --host with the name or IP address"),
        ({"hosts": (), "force": True}, r"^no host"),
        ({"names": ("a/b",)}, r"^device name 'a/b'"),
    ],
)
def test_wrong_arguments_change_nothing(options, expected, tmp_path):
    refused(expected, make, tmp_path / "keys", **{"hosts": HOSTS, "names": TWO} | options)
    assert not (tmp_path / "keys").exists()


# What is in the way


def check_refused(root, expected, call=make, error=UserError, **options):
    before = content(root)
    arguments = {"hosts": HOSTS, "names": TWO} if call is make else {}
    refused(expected, call, root, error=error, **arguments | options)
    assert content(root) == before


@pytest.mark.parametrize(
    "name, data, expected",
    [
        (
            "ca/ca.key",
            b"none",
            (
                r"ca/ca\.key: not an EC private key in PEM form without a passphrase; "
                r"restore it from a copy, or .* --force"
            ),
        ),
        ("ca/ca.crt", b"none", r"ca/ca\.crt: not a certificate in PEM form; restore it"),
        ("server/ca.crt", b"none", r"server/ca\.crt: not a certificate"),
        ("server/server.crt", b"", r"server/server\.crt: not a certificate"),
        ("server/server.key", b"none", r"server/server\.key: not an EC private key"),
        (
            "devices/device-002/device.key",
            b"none",
            r"device-002/device\.key: not an EC private key in OpenSSH form",
        ),
        ("devices/device-002/ca.crt", b"none", r"device-002/ca\.crt: not a certificate"),
        ("server/devices/device-002.pub", b"none", r"device-002\.pub: not one EC public key"),
        ("ca/ca.key", b"x" * 70_000, r"ca/ca\.key: longer than 65,536 bytes"),
    ],
)
def test_a_damaged_file_is_named(name, data, expected, root):
    (root / name).write_bytes(data)
    check_refused(root, expected)
    make(root, HOSTS, TWO, force=True)
    check_whole(root, TWO)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ca/ca.key", r"ca/ca\.key: does not belong to .*ca/ca\.crt"),
        ("ca/ca.crt", r"ca/ca\.key: does not belong to .*ca/ca\.crt"),
        ("server/ca.crt", r"ca/ca\.key: does not belong to .*server/ca\.crt"),
        ("server/server.crt", r"server/server\.crt: was not signed by the CA in .*ca/ca\.crt"),
        (
            "server/server.key",
            r"server/server\.key: does not belong to server\.crt; `fedtune provision renew -o ",
        ),
        (
            "devices/device-001/device.key",
            (
                r"device\.key: does not belong to .*device-001\.pub; `fedtune provision renew -o .* --device "
                r"device-001` makes both new"
            ),
        ),
        ("devices/device-001/ca.crt", r"devices/device-001/ca\.crt: is of another CA than .*ca/ca\.crt"),
    ],
)
def test_a_file_of_another_federation_is_named(name, expected, root, tmp_path):
    make(tmp_path / "other", HOSTS, TWO)
    shutil.copy(tmp_path / "other" / name, root / name)
    check_refused(root, expected)


def test_a_ca_of_another_federation_beside_the_server_is_named_without_its_key(root, tmp_path):
    make(tmp_path / "other", HOSTS, TWO)
    shutil.copy(tmp_path / "other" / "ca" / "ca.crt", root / "ca" / "ca.crt")
    (root / "ca" / "ca.key").unlink()
    check_refused(root, r"server/ca\.crt: is of another CA than .*ca/ca\.crt")


def test_a_certificate_that_is_no_ca_is_refused(root):
    shutil.copy(root / "server" / "server.crt", root / "ca" / "ca.crt")
    check_refused(root, r"ca/ca\.crt: not the certificate of a CA")


def test_a_ca_key_with_a_passphrase_is_refused(root):
    key = serialization.load_pem_private_key((root / "ca" / "ca.key").read_bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )
    (root / "ca" / "ca.key").write_bytes(encrypted)
    check_refused(root, r"ca/ca\.key: not an EC private key in PEM form without a passphrase")


def test_other_hosts_are_not_put_in_silently(root):
    check_refused(
        root,
        r"server\.crt: is for fed\.example\.org, .*, not new\.example\.org, .*; "
        r"change it with `fedtune provision renew -o .* --host …`, or .* --force",
        hosts=("new.example.org",),
    )


def test_names_that_differ_in_case_only_meet_over_two_calls(root):
    check_refused(
        root,
        r"device name 'DEVICE-001': differs from 'device-001' in upper and lower case only",
        names=("DEVICE-001",),
    )


def test_a_lost_ca_is_not_replaced_silently(root):
    shutil.rmtree(root / "ca")
    (root / "server" / "ca.crt").unlink()
    check_refused(root, r"ca/ca\.crt: is missing, though .*server\.key is there; restore it")


def test_keys_of_someone_else_are_not_overwritten(tmp_path):
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "server.key").write_text("of a web server")
    check_refused(tmp_path, r"ca/ca\.crt: is missing, though .*server/server\.key is there")


def test_a_folder_with_other_files_can_be_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    make(tmp_path, HOSTS, TWO)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name", [*KEYS, *OPEN, "ca", "server", "devices", "server/devices", "devices/device-002"]
)
@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_written_through_a_link(name, force, root, tmp_path):
    (root / name).rename(tmp_path / "elsewhere")
    (root / name).symlink_to(tmp_path / "elsewhere")
    check_refused(
        root,
        rf"/{name}: is a link, and keys are never written through one; remove it or choose another -o",
        force=force,
    )
    check_refused(root, "is a link", call=renew, names=("device-002",))


@pytest.mark.parametrize(
    "name", ["server/server.key", "devices/device-001/device.key", "server/devices/device-002.pub"]
)
def test_a_folder_in_place_of_a_file_is_refused(name, root):
    (root / name).unlink()
    (root / name).mkdir()
    check_refused(root, rf"/{name}: not a file; move it away", force=True)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "devices").write_text("")
    check_refused(tmp_path, r"/devices: not a folder; move it away")


@pytest.mark.parametrize("call, options", [(make, {"hosts": HOSTS, "names": TWO}), (renew, {})])
def test_a_file_in_place_of_the_root_is_refused(call, options, tmp_path):
    (tmp_path / "file").write_text("")
    refused(r"file: not a folder; choose another place with -o", call, tmp_path / "file", **options)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(r"link: not a folder", call, tmp_path / "link", **options)


def test_a_root_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refused(r"file: not a folder; choose another place with -o", make, tmp_path / "file" / "keys", HOSTS, TWO)


def test_a_root_that_cannot_be_written(tmp_path, monkeypatch):
    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    refused(
        r"cannot write .*keys: Permission denied; free space, check permissions",
        make,
        tmp_path / "keys",
        HOSTS,
        TWO,
        error=EnvironmentProblem,
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_root_without_rights(tmp_path):
    tmp_path.chmod(0o500)
    refused(
        r"cannot write .*: Permission denied", make, tmp_path / "keys", HOSTS, TWO, error=EnvironmentProblem
    )


def test_a_file_that_cannot_be_read(root, monkeypatch):
    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(
        r"cannot read .*ca\.crt: Permission denied; check permissions",
        inspect,
        root,
        error=EnvironmentProblem,
    )


def test_two_at_once_do_not_mix(root):
    fd = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        check_refused(root, r"another `fedtune provision` is at work here; wait for it")
    finally:
        os.close(fd)


@pytest.mark.parametrize("call", [renew, inspect])
def test_nothing_there(call, tmp_path):
    refused(
        r": nothing is provisioned here; `fedtune provision --host NAME --devices N -o .*` does it",
        call,
        tmp_path,
    )
    refused(r": nothing is provisioned here", call, tmp_path / "none")


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"within": -1}, r"^--within -1: give 0 to 3650 days"),
        ({"within": 4000}, r"^--within 4000: give 0 to 3650 days"),
        ({"days": 0}, r"^--days 0: give 1 to 3650"),
        (
            {"names": ("device-003",)},
            (
                r"^--device device-003: not known here; did you mean device-00[12]\? `fedtune "
                r"provision show` lists all"
            ),
        ),
        ({"names": ("device-001", "device-001")}, r"given twice"),
    ],
)
def test_a_renewal_that_cannot_be(options, expected, root):
    check_refused(root, expected, call=renew, **options)


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            {"within": 400},
            (
                r"ca/ca\.key: is not here \(kept offline\?\), and a server certificate needs it; "
                r"bring it back for this command"
            ),
        ),
        ({"within": 3650}, r"ca/ca\.key: is not here \(kept offline\?\), and renewing the CA needs it"),
        ({"hosts": ("new.example.org",)}, r"ca/ca\.key: is not here"),
    ],
)
def test_signing_needs_the_ca_key(options, expected, root):
    (root / "ca" / "ca.key").unlink()
    check_refused(root, expected, call=renew, **options)
    (root / "ca" / "ca.crt").unlink()
    check_refused(root, expected, call=renew, **options)


def test_a_missing_server_certificate_needs_the_ca_key(root):
    (root / "ca" / "ca.key").unlink()
    (root / "server" / "server.crt").unlink()
    check_refused(root, r"ca/ca\.key: is not here \(kept offline\?\), and a server certificate needs it")
    check_refused(root, r"server/server\.crt: is missing; say with --host what a new one is for", call=renew)


def test_new_keys_are_not_made_under_a_running_service(tmp_path):
    make(tmp_path, ["127.0.0.1"], ["one"])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with (tmp_path / "server" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by a running fedtune; stop it first"):
            make(tmp_path, ["127.0.0.1"], ["one"], force=True)
        make(tmp_path, [], ["two"])  # enrolling goes on
    assert all(p.read_bytes() == data for p, data in before.items())
