"""Keys and certificates of a federation: a private CA, the coordinator's certificate and one key pair for each device.

    ROOT/ca/        ca.key  ca.crt                              keep offline; needed only to renew
    ROOT/server/    ca.crt  server.crt  server.key  devices/NAME.pub…    what the coordinator needs
    ROOT/devices/NAME/      ca.crt  device.key                  what that device needs

Everything is planned in memory first, so that a mistake changes nothing; then files are written one by one, each whole or absent:
the CA, the server, the devices, and of each the private key before what is made from it. So what a crash leaves can be told from what
a person moved away. A private key without its certificate or public key is a job half done, and running again finishes it. A
certificate or public key without its private key was delivered: the key lives elsewhere, and nothing here may replace it unasked.

A CA is renewed with its own key and name, so certificates it signed before and copies of ca.crt handed out before stay good together.
Private keys are 0600 from their first byte and lie in folders of 0700, whatever the umask.
"""

import contextlib
import difflib
import fcntl
import hashlib
import ipaddress
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.errors import EnvironmentProblem, UserError
from fedtune.storage import failing_clearly

DAYS, CA_DAYS, WITHIN = 365, 1825, 30
MAX_DAYS, MAX_CA_DAYS = 3650, 7300
MAX_DEVICES = 10_000
ALWAYS = ("localhost", "127.0.0.1", "::1")
BACKDATED = timedelta(minutes=10)  # a device whose clock is a little behind must not find the certificate too young

_LARGEST = 64 * 1024  # bytes of a key or certificate file
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_SSH_KINDS = (b"ecdsa-sha2-nistp256", b"ecdsa-sha2-nistp384", b"ecdsa-sha2-nistp521")  # not the certificates and tokens named alike
_NO_HOST = "no host: give --host with the name or IP address devices reach the coordinator under"
_ANEW = "restore it from a copy, or make everything new with --force"

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Item:
    """Something provisioned. `kind` is ca, server or device; device keys do not expire. `has_key`: its private key lies here too."""

    name: str
    path: Path
    kind: str
    not_after: datetime | None = None
    hosts: tuple[str, ...] = ()
    has_key: bool = True


@dataclass(frozen=True)
class Report:
    """What a call did: items made new, items left as they were, devices removed, and what a person has to do now, a sentence each."""

    root: Path
    hosts: tuple[str, ...]
    made: tuple[Item, ...]
    kept: tuple[Item, ...]
    removed: tuple[str, ...]
    todo: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Where everything lies under `root`."""

    root: Path

    @property
    def ca_key(self) -> Path:
        return self.root / "ca" / "ca.key"

    @property
    def ca_crt(self) -> Path:
        return self.root / "ca" / "ca.crt"

    @property
    def server(self) -> Path:
        return self.root / "server"

    @property
    def server_ca(self) -> Path:
        return self.server / "ca.crt"

    @property
    def server_key(self) -> Path:
        return self.server / "server.key"

    @property
    def server_crt(self) -> Path:
        return self.server / "server.crt"

    @property
    def devices(self) -> Path:
        return self.root / "devices"

    @property
    def pubs(self) -> Path:
        return self.server / "devices"

    def pub(self, name: str) -> Path:
        return self.pubs / f"{name}.pub"

    def device_key(self, name: str) -> Path:
        return self.devices / name / "device.key"

    def device_ca(self, name: str) -> Path:
        return self.devices / name / "ca.crt"

    def files(self, names: Iterable[str]) -> list[Path]:
        """Every file of the CA, the server and these devices."""
        fixed = [self.ca_key, self.ca_crt, self.server_ca, self.server_key, self.server_crt]
        return fixed + [path for name in names for path in (self.device_key(name), self.device_ca(name), self.pub(name))]

    def known(self) -> tuple[str, ...]:
        """Names of all devices that have a public key for the coordinator, or a private one here."""
        enrolled = {path.stem for path in _listed(self.pubs) if path.suffix == ".pub"}
        return tuple(sorted(enrolled | {path.name for path in _listed(self.devices) if _exists(path / "device.key")}))


@dataclass(frozen=True)
class _File:
    path: Path
    data: bytes
    secret: bool


@dataclass(frozen=True)
class _Ca:
    """`key` is None while it is kept offline."""

    key: Key | None
    cert: x509.Certificate


@dataclass
class _Plan:
    files: list[_File] = field(default_factory=list)
    made: list[Item] = field(default_factory=list)
    kept: list[Item] = field(default_factory=list)
    replaced_until: datetime | None = None  # when the first ca.crt ends that is replaced by a newer one

    def add(self, item: Item, new: bool) -> None:
        (self.made if new else self.kept).append(item)

    def secret(self, path: Path, data: bytes) -> None:
        self.files.append(_File(path, data, True))

    def public(self, path: Path, data: bytes) -> None:
        self.files.append(_File(path, data, False))


def make(
    root: Path, hosts: Sequence[str], names: Sequence[str], days: int = DAYS, ca_days: int = CA_DAYS, force: bool = False, now: datetime | None = None,
) -> Report:
    """Makes what is missing of a CA, a server certificate for `hosts`, and key pairs for the devices `names`.

    What is there stays as it is, so calling again with more names enrols more devices; that needs no CA key. `hosts` may be empty
    when there is a server certificate. `force` makes everything new, and devices not in `names` are removed with the old CA.

    Raises:
        UserError: a host, name or number of days that cannot be; a file in the way that is damaged, a link, of another CA, or for
            other hosts; the CA's key is not here and something is to be signed. Nothing is written then.
        EnvironmentProblem: the folder cannot be written or read. What was written is finished by calling again.
    """
    now = _moment(now)
    wanted = sans(hosts) if hosts else ()
    names = check_names(names)
    _check_days(days, ca_days)
    layout = Layout(root)
    if not wanted and (force or not _exists(layout.server_crt)):
        raise UserError(_NO_HOST)
    _folder(root)
    with _held(root):
        known = layout.known()
        removed = tuple(name for name in known if force and name not in names)
        _require_plain(root, layout.files([*names, *removed]))
        plan = _Plan()
        if force:
            ca = _plan_new_ca(plan, layout, ca_days, now)
        else:
            _refuse_twins(names, known)
            ca = _plan_ca(plan, layout, ca_days, now)
        found = _plan_server(plan, layout, ca, wanted, days, force, now)
        for name in names:
            _plan_device(plan, layout, ca, name, force)
        _remove(layout, removed)
        _carry_out(plan)
    return Report(root, found, tuple(plan.made), tuple(plan.kept), removed, tuple(_to_do(layout, plan, removed)))


def renew(
    root: Path, within: int = WITHIN, hosts: Sequence[str] = (), days: int = DAYS, names: Sequence[str] = (), now: datetime | None = None,
) -> Report:
    """Replaces what expires within so many days, and the key pairs of the devices `names`.

    The server gets a new key and a certificate for the same hosts, or for `hosts`, which are a reason to renew if they are others.
    The CA gets a new certificate for its old key, as long-lived as the last, and every copy of ca.crt here is brought up to date.
    With `names` and no `hosts` only these devices are touched: a stolen one is shut out without the CA's key at hand.

    Raises:
        UserError: nothing provisioned at `root`; a device that is not known; the CA's key is needed and not here; arguments or files as
            for `make`. Nothing is written then.
        EnvironmentProblem: the folder cannot be written or read. What was written is finished by calling again.
    """
    now = _moment(now)
    wanted = sans(hosts) if hosts else ()
    names = check_names(names)
    _check_days(days, MAX_CA_DAYS)
    if not 0 <= within <= MAX_DAYS:
        raise UserError(f"--within {within}: give 0 to {MAX_DAYS} days")
    layout = Layout(root)
    _require_no_file(root)
    if not _is_folder(root):
        raise _nothing_here(root)
    with _held(root):
        known = layout.known()
        _require_known(names, known)
        _require_plain(root, layout.files(known))
        certificates = bool(hosts or not names)
        ca = _read_ca(layout, with_key=certificates)
        if ca is None:
            raise _nothing_here(root)
        plan = _Plan()
        if certificates:
            ca = _plan_renewed_ca(plan, layout, ca, known, within, days, now)
            found = _plan_renewed_server(plan, layout, ca, wanted, within, days, now)
        else:
            plan.kept += [_ca_item(layout, ca), *_server_items(layout)]
            found = plan.kept[-1].hosts
        for name in names:
            _plan_device(plan, layout, ca, name, anew=True)
        _carry_out(plan)
    return Report(root, found, tuple(plan.made), tuple(plan.kept), (), tuple(_to_do_renewed(layout, plan, now)))


def inspect(root: Path) -> list[Item]:
    """Everything provisioned at `root`: the CA, the server certificate, the devices by name. Needs no private key and changes nothing.

    Raises UserError when nothing is provisioned there or a certificate is damaged.
    """
    layout = Layout(root)
    ca = _read_ca(layout, with_key=False) if _is_folder(root) else None
    if ca is None:
        raise _nothing_here(root)
    return [_ca_item(layout, ca), *_server_items(layout), *(_device_item(layout, name) for name in layout.known())]


def load_devices(folder: Path) -> dict[str, bytes]:
    """Name -> public key (PEM, SubjectPublicKeyInfo) of every NAME.pub in `folder`, by name. Empty when there are none.

    Raises:
        UserError: the folder is missing; a file is not one EC public key in OpenSSH form, or its name is no device name; two files
            hold the same key, so that one device could pass for the other.
        EnvironmentProblem: the folder or a file cannot be read.
    """
    if not _is_folder(folder):
        raise UserError(f"{folder}: not a folder; give the folder of .pub files that `fedtune provision` made, server/devices")
    paths = [path for path in _listed(folder) if path.suffix == ".pub"]
    found: dict[str, bytes] = {}
    owner: dict[bytes, Path] = {}
    for path in paths:
        if not _NAME.fullmatch(path.stem):
            raise UserError(f"{path}: {path.stem!r} is not a device name (letters, digits and . _ -, at most 64); rename or remove it")
        key = _public_pem(_parse_pub(path, _read(path) or b""))
        if key in owner:
            raise UserError(f"{path}: holds the same key as {owner[key].name}; each device needs its own: `fedtune provision renew --device {path.stem}`")
        owner[key] = path
        found[path.stem] = key
    return found


def device_names(count: int | None, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """device-001 … for `count`, then `extra`. Raises UserError for a count out of range, no device at all, and bad or repeated names."""
    if count is not None and not 0 <= count <= MAX_DEVICES:
        raise UserError(f"--devices {count}: give 1 to {MAX_DEVICES}")
    if not count and not extra:
        raise UserError(f"{'--devices 0' if count == 0 else 'no device'}: give --devices 1 to {MAX_DEVICES}, or --device NAME")
    return check_names([*(f"device-{i:03d}" for i in range(1, (count or 0) + 1)), *extra])


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Device names as given. Raises UserError for one that is not a plain file name, and for two that differ in case at most."""
    seen: dict[str, str] = {}
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(f"device name {_short(name)}: give letters, digits and . _ - (at most 64, the first a letter or digit)")
        if name.casefold() in seen:
            raise _twin(name, seen[name.casefold()])
        seen[name.casefold()] = name
    return tuple(names)


def sans(hosts: Sequence[str]) -> tuple[str, ...]:
    """The names a server certificate is for: `hosts` in order, then localhost and the loopback addresses; each once, in canonical form.

    Raises UserError for what is neither a DNS name nor an IP address, and for no host at all.
    """
    if not hosts:
        raise UserError(_NO_HOST)
    return tuple(dict.fromkeys([*(check_host(host) for host in hosts), *ALWAYS]))


def check_host(text: str) -> str:
    """A DNS name in lower case, or an IP address in canonical form. Raises UserError that says what is wrong with `text`."""
    address = _address(text)
    if address is not None:
        if "%" in text or address.is_unspecified or address.is_multicast:
            raise UserError(f"--host {_short(text)}: not an address devices can reach; give the coordinator's own, or its DNS name")
        return str(address)
    trouble = _host_trouble(text)
    if trouble:
        raise UserError(f"--host {_short(text)}: {trouble}")
    return text.lower()


def _host_trouble(text: str) -> str | None:
    if not text.isascii():
        return "holds characters outside ASCII; give the punycode form (xn--…)"
    if "://" in text:
        return "is a URL; give the name or address alone, without scheme, port and path"
    if "*" in text:
        return "is a wildcard; give each name with a --host of its own"
    if re.fullmatch(r"\[[^\]]*\](:\d*)?|[^:]+:\d*", text):
        return "has a port or brackets; give the name or address alone"
    if len(text) > 253:
        return f"has {len(text)} characters; a DNS name has at most 253"
    labels = text.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        return "neither a DNS name (letters, digits and -, with dots between) nor an IP address"
    return None


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:60] + "…")


def _twin(name: str, other: str) -> UserError:
    if name == other:
        return UserError(f"device name {name!r}: given twice; give each once")
    return UserError(f"device name {name!r}: differs from {other!r} in upper and lower case only; choose another name")


def _refuse_twins(names: Sequence[str], known: Sequence[str]) -> None:
    folded = {name.casefold(): name for name in known}
    for name in names:
        other = folded.get(name.casefold(), name)
        if other != name:
            raise _twin(name, other)


def _require_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"--device {name}: not known here; {hint}`fedtune provision show` lists all, `fedtune provision --device {name}` adds it")


def _check_days(days: int, ca_days: int) -> None:
    if not 1 <= days <= MAX_DAYS:
        raise UserError(f"--days {days}: give 1 to {MAX_DAYS}")
    if not days <= ca_days <= MAX_CA_DAYS:
        raise UserError(f"--ca-days {ca_days}: give --days ({days}) to {MAX_CA_DAYS}; the server certificate cannot outlive its CA")


def _moment(now: datetime | None) -> datetime:
    return (now or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)  # certificates know whole seconds


def _nothing_here(root: Path) -> UserError:
    return UserError(f"{root}: nothing is provisioned here; `fedtune provision --host NAME --devices N -o {root}` does it")


# What is to be done, in the order it is written


def _plan_new_ca(plan: _Plan, layout: Layout, ca_days: int, now: datetime) -> _Ca:
    key = ec.generate_private_key(ec.SECP256R1())
    ca = _Ca(key, _issue_ca(key, ca_days, now))
    plan.secret(layout.ca_key, _key_pem(key))
    plan.public(layout.ca_crt, _cert_pem(ca.cert))
    plan.public(layout.server_ca, _cert_pem(ca.cert))
    plan.add(_ca_item(layout, ca), new=True)
    return ca


def _plan_ca(plan: _Plan, layout: Layout, ca_days: int, now: datetime) -> _Ca:
    """The CA that is there, its missing copies added; a new one only where nothing was made yet."""
    ca = _read_ca(layout)
    key = None if ca else _read_key(layout.ca_key)
    if ca is None and key is None:
        orphans = [path for path in (layout.server_key, layout.server_crt) if _exists(path)] + [layout.pub(name) for name in layout.known()]
        if orphans:
            raise UserError(f"{layout.ca_crt}: is missing, though {orphans[0]} is there; {_ANEW}")
        return _plan_new_ca(plan, layout, ca_days, now)
    new = ca is None
    if ca is None:
        assert key is not None
        ca = _Ca(key, _issue_ca(key, ca_days, now))
    _plan_copies(plan, layout, ca)
    plan.add(_ca_item(layout, ca), new)
    return ca


def _plan_renewed_ca(plan: _Plan, layout: Layout, ca: _Ca, known: Sequence[str], within: int, days: int, now: datetime) -> _Ca:
    """Also counts as renewed when only copies were behind: then the call that renewed it was interrupted before it could say so."""
    if _due(ca.cert, within, now):
        lifetime = (ca.cert.not_valid_after_utc - ca.cert.not_valid_before_utc).days
        ca = _Ca(ca.key, _issue_ca(_required_key(layout, ca, "renewing the CA"), max(lifetime, days), now))
    _plan_copies(plan, layout, ca, [layout.device_ca(name) for name in known if _exists(layout.device_key(name))])
    plan.add(_ca_item(layout, ca), new=plan.replaced_until is not None)
    return ca


def _plan_copies(plan: _Plan, layout: Layout, ca: _Ca, others: Sequence[Path] = ()) -> None:
    """Brings every ca.crt up to date. The one beside the CA's key only if that is there: they are kept offline together."""
    for path in (*([layout.ca_crt] if ca.key else []), layout.server_ca, *others):
        _plan_copy(plan, layout, ca, path)


def _plan_copy(plan: _Plan, layout: Layout, ca: _Ca, path: Path) -> None:
    found = _read_cert(path)
    if found == ca.cert:
        return
    if found is not None:
        if found.public_key() != ca.cert.public_key():
            raise UserError(f"{path}: is of another CA than {_ca_path(layout)}; {_ANEW}")
        ends = found.not_valid_after_utc
        plan.replaced_until = min(ends, plan.replaced_until or ends)
    plan.public(path, _cert_pem(ca.cert))


def _plan_server(plan: _Plan, layout: Layout, ca: _Ca, wanted: tuple[str, ...], days: int, anew: bool, now: datetime) -> tuple[str, ...]:
    """The hosts the certificate is for."""
    cert = None if anew else _read_cert(layout.server_crt)
    key = None if anew else _read_key(layout.server_key)
    if cert is None:
        _plan_new_server(plan, layout, ca, wanted, days, key, now)
        return wanted
    _require_issued(layout, cert, ca)
    if key and key.public_key() != cert.public_key():
        raise UserError(f"{layout.server_key}: does not belong to server.crt; `fedtune provision renew -o {layout.root}` makes both new")
    hosts = _hosts(layout.server_crt, cert)
    if wanted and set(wanted) != set(hosts):
        raise UserError(
            f"{layout.server_crt}: is for {', '.join(hosts)}, not {', '.join(wanted)}; change it with `fedtune provision renew -o {layout.root} --host …`, "
            "or make everything new with --force")
    plan.add(_server_item(layout, cert, key is not None), new=False)
    return hosts


def _plan_renewed_server(
    plan: _Plan, layout: Layout, ca: _Ca, wanted: tuple[str, ...], within: int, days: int, now: datetime,
) -> tuple[str, ...]:
    """The hosts the certificate is for. A damaged one can be renewed too, when its hosts are given."""
    cert = None if wanted and _damaged(layout.server_crt) else _read_cert(layout.server_crt)
    hosts = wanted or (_hosts(layout.server_crt, cert) if cert else ())
    if not hosts:
        raise UserError(f"{layout.server_crt}: is missing; say with --host what a new one is for")
    if cert is not None:
        _require_issued(layout, cert, ca)
        if not _due(cert, within, now) and set(hosts) == set(_hosts(layout.server_crt, cert)) and _fits(layout.server_key, cert):
            plan.add(_server_item(layout, cert, _exists(layout.server_key)), new=False)
            return hosts
    _plan_new_server(plan, layout, ca, hosts, days, None, now)
    return hosts


def _plan_new_server(plan: _Plan, layout: Layout, ca: _Ca, hosts: tuple[str, ...], days: int, key: Key | None, now: datetime) -> None:
    """`key`: one that an interrupted call left without a certificate."""
    ca_key = _required_key(layout, ca, "a server certificate")
    if ca.cert.not_valid_after_utc <= now:
        until = ca.cert.not_valid_after_utc
        raise UserError(f"{_ca_path(layout)}: expired on {until:%Y-%m-%d}; renew it with `fedtune provision renew -o {layout.root} --host …`")
    if key is None:
        key = ec.generate_private_key(ec.SECP256R1())
        plan.secret(layout.server_key, _key_pem(key))
    cert = _issue_server(ca_key, ca.cert, key.public_key(), hosts, days, now)
    plan.public(layout.server_crt, _cert_pem(cert))
    plan.add(_server_item(layout, cert, True), new=True)


def _plan_device(plan: _Plan, layout: Layout, ca: _Ca, name: str, anew: bool) -> None:
    key = None if anew else _read_device_key(layout.device_key(name))
    pub = None if anew else _read_pub(layout.pub(name))
    item = Item(name, layout.device_key(name), "device")
    if pub is not None and key is None:
        plan.add(_device_item(layout, name), new=False)
        return
    if pub is not None and key is not None and _public_pem(pub) != _public_pem(key.public_key()):
        raise UserError(
            f"{layout.device_key(name)}: does not belong to {layout.pub(name)}; `fedtune provision renew -o {layout.root} --device {name}` makes both new")
    if key is None:
        key = ec.generate_private_key(ec.SECP384R1())
        plan.secret(layout.device_key(name), _key_openssh(key))
    if anew:
        plan.public(layout.device_ca(name), _cert_pem(ca.cert))
    else:
        _plan_copy(plan, layout, ca, layout.device_ca(name))
    if pub is None:
        plan.public(layout.pub(name), _pub_line(key.public_key(), name))
    plan.add(item, new=pub is None)


def _due(cert: x509.Certificate, within: int, now: datetime) -> bool:
    return cert.not_valid_after_utc <= now + timedelta(days=within)


def _required_key(layout: Layout, ca: _Ca, for_what: str) -> Key:
    if ca.key is None:
        raise UserError(f"{layout.ca_key}: is not here (kept offline?), and {for_what} needs it; bring it back for this command")
    return ca.key


# What a person does next


def _to_do(layout: Layout, plan: _Plan, removed: Sequence[str]) -> Iterator[str]:
    kinds = {item.kind for item in plan.made}
    if "ca" in kinds:
        yield f"keep {layout.root / 'ca'} offline: whoever holds ca.key can pose as the coordinator; only renewing needs it"
    if "server" in kinds or removed:
        yield f"copy {layout.server} to the coordinator{' in place of the old one' if removed else ''}"
    elif "device" in kinds:
        yield f"copy {layout.pubs} to the coordinator: it lets in the devices listed there"
    yield from _deliver(layout, plan)


def _to_do_renewed(layout: Layout, plan: _Plan, now: datetime) -> Iterator[str]:
    kinds = {item.kind for item in plan.made}
    if "ca" in kinds and plan.replaced_until:
        until = plan.replaced_until
        yield f"every device needs the new ca.crt: copy {layout.server_ca} to each, " + (
            f"before {until:%Y-%m-%d}; until then the old and the new one both work" if until > now
            else f"now: the old one expired on {until:%Y-%m-%d}, and a device that has it cannot connect")
    if kinds & {"ca", "server"}:
        yield f"copy {layout.server} to the coordinator and restart it"
    elif "device" in kinds:
        yield f"copy {layout.pubs} to the coordinator and restart it, so that it refuses the old key of {names_in_short(_devices(plan))}"
    yield from _deliver(layout, plan)


def _deliver(layout: Layout, plan: _Plan) -> Iterator[str]:
    names = _devices(plan)
    if len(names) == 1:
        yield f"copy {layout.devices / names[0]} to {names[0]}, and to no other device"
    elif names:
        yield f"copy each folder in {layout.devices} to the device of its name, and to no other: {names_in_short(names)}"


def _devices(plan: _Plan) -> list[str]:
    return [item.name for item in plan.made if item.kind == "device"]


def names_in_short(names: Sequence[str]) -> str:
    """All of them, or the first and the last of many."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} … {names[-1]}"


# What is there


def _read_ca(layout: Layout, with_key: bool = True) -> _Ca | None:
    """The newest certificate of the CA in its own folder or the server's, and its key if that is here; None without a certificate."""
    certs = {path: cert for path in (layout.ca_crt, layout.server_ca) if (cert := _read_cert(path)) is not None}
    if not certs:
        return None
    key = _read_key(layout.ca_key) if with_key else None
    first = next(iter(certs))
    for path, cert in certs.items():
        if not _is_ca(cert):
            raise UserError(f"{path}: not the certificate of a CA; {_ANEW}")
        if key and key.public_key() != cert.public_key():
            raise UserError(f"{layout.ca_key}: does not belong to {path}; {_ANEW}")
        if cert.public_key() != certs[first].public_key():
            raise UserError(f"{path}: is of another CA than {first}; {_ANEW}")
    return _Ca(key, max(certs.values(), key=lambda cert: cert.not_valid_after_utc))


def _ca_path(layout: Layout) -> Path:
    return layout.server_ca if _exists(layout.server_ca) and not _exists(layout.ca_crt) else layout.ca_crt


def _ca_item(layout: Layout, ca: _Ca) -> Item:
    return Item("CA", _ca_path(layout), "ca", ca.cert.not_valid_after_utc, has_key=ca.key is not None or _exists(layout.ca_key))


def _server_item(layout: Layout, cert: x509.Certificate, has_key: bool) -> Item:
    return Item("server", layout.server_crt, "server", cert.not_valid_after_utc, _hosts(layout.server_crt, cert), has_key)


def _server_items(layout: Layout) -> list[Item]:
    """The server certificate, if there is one."""
    cert = _read_cert(layout.server_crt)
    return [_server_item(layout, cert, _exists(layout.server_key))] if cert else []


def _device_item(layout: Layout, name: str) -> Item:
    has_key = _exists(layout.device_key(name))
    return Item(name, layout.device_key(name) if has_key else layout.pub(name), "device", has_key=has_key)


def _is_ca(cert: x509.Certificate) -> bool:
    try:
        return cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _hosts(path: Path, cert: x509.Certificate) -> tuple[str, ...]:
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        raise UserError(f"{path}: names no hosts, so fedtune did not make it; {_ANEW}") from None
    return tuple(str(name.value) for name in names)


def _require_issued(layout: Layout, cert: x509.Certificate, ca: _Ca) -> None:
    try:
        cert.verify_directly_issued_by(ca.cert)
    except (ValueError, TypeError, InvalidSignature):
        raise UserError(f"{layout.server_crt}: was not signed by the CA in {_ca_path(layout)}; {_ANEW}") from None


def _fits(path: Path, cert: x509.Certificate) -> bool:
    """Whether the key at `path` is the certificate's. An absent one is: it was delivered with it."""
    try:
        key = _read_key(path)
    except UserError:
        return False
    return key is None or key.public_key() == cert.public_key()


def _damaged(path: Path) -> bool:
    try:
        _read_cert(path)
    except UserError:
        return True
    return False


# Certificates


def _issue_ca(key: Key, days: int, now: datetime) -> x509.Certificate:
    """Self-signed. The name comes from the key, so a renewed certificate bears the name that those signed before it look for."""
    name = _named(f"fedtune CA {hashlib.sha256(_public_pem(key.public_key())).hexdigest()[:12]}")
    usage = _usage(digital_signature=False, signs_certificates=True)
    made = _builder(name, name, key.public_key(), key, now, now + timedelta(days=days))
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).add_extension(usage, critical=True)
    return made.sign(key, hashes.SHA256())


def _issue_server(ca_key: Key, ca: x509.Certificate, key: PublicKey, hosts: Sequence[str], days: int, now: datetime) -> x509.Certificate:
    """Good for so many days, or until the CA ends."""
    until = min(now + timedelta(days=days), ca.not_valid_after_utc)
    names = [x509.IPAddress(address) if (address := _address(host)) else x509.DNSName(host) for host in hosts]
    made = _builder(_named("fedtune server"), ca.subject, key, ca_key, now, until)
    made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    made = made.add_extension(_usage(digital_signature=True, signs_certificates=False), critical=True)
    made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return made.sign(ca_key, hashes.SHA256())


def _builder(subject: x509.Name, issuer: x509.Name, key: PublicKey, ca_key: Key, now: datetime, until: datetime) -> x509.CertificateBuilder:
    """What both certificates have. The authority is named by its key alone: a serial number would tie it to one issue of the CA."""
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key).serial_number(x509.random_serial_number())
    made = made.not_valid_before(now - BACKDATED).not_valid_after(until)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    return made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(digital_signature: bool, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, key_cert_sign=signs_certificates, crl_sign=signs_certificates, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False)


# Bytes of keys and certificates


def _cert_pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: Key) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _key_openssh(key: Key) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())


def _public_pem(key: PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _pub_line(key: PublicKey, name: str) -> bytes:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + f" {name}\n".encode()


def _read_cert(path: Path) -> x509.Certificate | None:
    data = _read(path)
    if data is None:
        return None
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError:
        raise UserError(f"{path}: not a certificate in PEM form; {_ANEW}") from None


def _read_key(path: Path) -> Key | None:
    data = _read(path)
    if data is None:
        return None
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Key):
        raise UserError(f"{path}: not an EC private key in PEM form without a passphrase; {_ANEW}")
    return key


def _read_device_key(path: Path) -> Key | None:
    data = _read(path)
    if data is None:
        return None
    try:
        key = serialization.load_ssh_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Key):
        raise UserError(f"{path}: not an EC private key in OpenSSH form without a passphrase; restore it, or `fedtune provision renew --device {path.parent.name}`")
    return key


def _read_pub(path: Path) -> PublicKey | None:
    data = _read(path)
    return None if data is None else _parse_pub(path, data)


def _parse_pub(path: Path, data: bytes) -> PublicKey:
    lines = [line for line in data.split(b"\n") if line.strip()]
    try:
        if len(lines) == 1 and lines[0].split()[0] in _SSH_KINDS:
            key = serialization.load_ssh_public_key(lines[0])
            if isinstance(key, PublicKey):
                return key
    except (ValueError, UnsupportedAlgorithm):
        pass
    raise UserError(f"{path}: not one EC public key in OpenSSH form (a line ecdsa-sha2-nistp384 …); `fedtune provision renew --device {path.stem}` makes it new")


def _read(path: Path) -> bytes | None:
    """None when there is no such file. Raises UserError for what is no file or too long, EnvironmentProblem for what cannot be read."""
    with _reading(path):
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise UserError(f"{path}: not a plain file; move it away")
            with path.open("rb") as file:
                data = file.read(_LARGEST + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
    if len(data) > _LARGEST:
        raise UserError(f"{path}: longer than {_LARGEST:,} bytes, so neither a key nor a certificate; move it away or restore it from a copy")
    return data


def _exists(path: Path) -> bool:
    """Unlike pathlib's, fails in one line where folders may not be looked into."""
    with _reading(path):
        return path.exists()


def _is_folder(path: Path) -> bool:
    with _reading(path):
        return path.is_dir()


def _listed(folder: Path) -> list[Path]:
    """What is in the folder, by name; nothing when there is no such folder. Raises EnvironmentProblem when it cannot be read."""
    with _reading(folder):
        try:
            return sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise EnvironmentProblem(f"cannot read {path}: {e.strerror or e}; check permissions") from e


# Files and folders


def _require_no_file(path: Path) -> None:
    if os.path.lexists(path) and not _is_folder(path):
        raise UserError(f"{path}: not a folder; choose another place with -o")


def _require_plain(root: Path, paths: Iterable[Path]) -> None:
    """Raises UserError for a link, or something that is no file or folder, where a file or a folder on the way to it would go."""
    folders: dict[Path, None] = {}
    for path in paths:
        above = path.parents
        folders.update(dict.fromkeys(above[: above.index(root)]))
        _require_kind(path, stat.S_ISREG, "file")
    for folder in folders:
        _require_kind(folder, stat.S_ISDIR, "folder")


def _require_kind(path: Path, test: Callable[[int], bool], word: str) -> None:
    with _reading(path):
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
    if stat.S_ISLNK(mode):
        raise UserError(f"{path}: is a link, and keys are never written through one; remove it or choose another -o")
    if not test(mode):
        raise UserError(f"{path}: not a {word}; move it away or choose another -o")


@contextlib.contextmanager
def _held(root: Path) -> Iterator[None]:
    """Keeps a second call out meanwhile. Raises UserError when one is at work."""
    with failing_clearly(root):
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{root}: another `fedtune provision` is at work here; wait for it") from None
        except OSError:
            pass  # some network file systems lock no folders; what is lost is only the guard against two people at once
        yield
    finally:
        os.close(fd)


def _carry_out(plan: _Plan) -> None:
    for file in plan.files:
        _folder(file.path.parent)
        if file.secret:
            with failing_clearly(file.path.parent):
                os.chmod(file.path.parent, 0o700)
        _write(file)


def _folder(path: Path) -> None:
    """Makes the folder and those above it, 0700 each; leaves what exists as it is."""
    if _is_folder(path):
        return
    _require_no_file(path)
    _folder(path.parent)
    with failing_clearly(path):
        path.mkdir(0o700)
        path.chmod(0o700)  # a strict umask may have taken rights from the owner
        _sync(path.parent)


def _write(file: _File) -> None:
    """Whole or absent, and at no instant with more rights than it ends with."""
    part = file.path.with_name(f".{file.path.name}.part")
    with failing_clearly(file.path):
        part.unlink(missing_ok=True)  # of a call that was killed
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                os.fchmod(f.fileno(), 0o600 if file.secret else 0o644)
                f.write(file.data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, file.path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync(file.path.parent)


def _remove(layout: Layout, names: Iterable[str]) -> None:
    """First the public key, which is what lets a device in; then the device's folder, if nothing else is in it."""
    for name in names:
        for path in (layout.pub(name), layout.device_key(name), layout.device_ca(name)):
            with failing_clearly(path):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (layout.devices / name).rmdir()


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
