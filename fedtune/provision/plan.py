"""What is to be made, renewed and copied, as files in the order they are written. Nothing is written here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.errors import UserError
from fedtune.provision.certificates import (
    ANEW,
    Key,
    cert_pem,
    damaged,
    fits,
    hosts_of,
    issue_ca,
    issue_server,
    key_openssh,
    key_pem,
    pub_line,
    public_pem,
    read_cert,
    read_device_key,
    read_key,
    read_pub,
)
from fedtune.provision.files import File, exists
from fedtune.provision.found import Ca, ca_item, ca_path, device_item, read_ca, require_issued, server_item
from fedtune.provision.layout import Item, Layout


@dataclass
class ProvisionPlan:
    files: list[File] = field(default_factory=list)
    made: list[Item] = field(default_factory=list)
    kept: list[Item] = field(default_factory=list)
    replaced_until: datetime | None = None  # when the first ca.crt ends that is replaced by a newer one

    def add(self, item: Item, new: bool) -> None:
        (self.made if new else self.kept).append(item)

    def secret(self, path: Path, data: bytes) -> None:
        self.files.append(File(path, data, True))

    def public(self, path: Path, data: bytes) -> None:
        self.files.append(File(path, data, False))


def plan_new_ca(plan: ProvisionPlan, layout: Layout, ca_days: int, now: datetime) -> Ca:
    key = ec.generate_private_key(ec.SECP256R1())
    ca = Ca(key, issue_ca(key, ca_days, now))
    plan.secret(layout.ca_key, key_pem(key))
    plan.public(layout.ca_crt, cert_pem(ca.cert))
    plan.public(layout.server_ca, cert_pem(ca.cert))
    plan.add(ca_item(layout, ca), new=True)
    return ca


def plan_ca(plan: ProvisionPlan, layout: Layout, ca_days: int, now: datetime) -> Ca:
    """The CA that is there, its missing copies added; a new one only where nothing was made yet."""
    ca = read_ca(layout)
    key = None if ca else read_key(layout.ca_key)
    if ca is None and key is None:
        orphans = [path for path in (layout.server_key, layout.server_crt) if exists(path)] + [
            layout.pub(name) for name in layout.known()
        ]
        if orphans:
            raise UserError(f"{layout.ca_crt}: is missing, though {orphans[0]} is there; {ANEW}")
        return plan_new_ca(plan, layout, ca_days, now)
    new = ca is None
    if ca is None:
        assert key is not None
        ca = Ca(key, issue_ca(key, ca_days, now))
    _plan_copies(plan, layout, ca)
    plan.add(ca_item(layout, ca), new)
    return ca


def plan_renewed_ca(
    plan: ProvisionPlan, layout: Layout, ca: Ca, known: Sequence[str], within: int, days: int, now: datetime
) -> Ca:
    """Also counts as renewed when only copies were behind: then the call that renewed it was
    interrupted before it could say so.
    """
    if _due(ca.cert, within, now):
        lifetime = (ca.cert.not_valid_after_utc - ca.cert.not_valid_before_utc).days
        ca = Ca(ca.key, issue_ca(_required_key(layout, ca, "renewing the CA"), max(lifetime, days), now))
    _plan_copies(
        plan, layout, ca, [layout.device_ca(name) for name in known if exists(layout.device_key(name))]
    )
    plan.add(ca_item(layout, ca), new=plan.replaced_until is not None)
    return ca


def _plan_copies(plan: ProvisionPlan, layout: Layout, ca: Ca, others: Sequence[Path] = ()) -> None:
    """Brings every ca.crt up to date.

    The one beside the CA's key only if that is there: they are kept offline together.
    """
    for path in (*([layout.ca_crt] if ca.key else []), layout.server_ca, *others):
        _plan_copy(plan, layout, ca, path)


def _plan_copy(plan: ProvisionPlan, layout: Layout, ca: Ca, path: Path) -> None:
    found = read_cert(path)
    if found == ca.cert:
        return
    if found is not None:
        if found.public_key() != ca.cert.public_key():
            raise UserError(f"{path}: is of another CA than {ca_path(layout)}; {ANEW}")
        ends = found.not_valid_after_utc
        plan.replaced_until = min(ends, plan.replaced_until or ends)
    plan.public(path, cert_pem(ca.cert))


def plan_server(
    plan: ProvisionPlan, layout: Layout, ca: Ca, wanted: tuple[str, ...], days: int, anew: bool, now: datetime
) -> tuple[str, ...]:
    """The hosts the certificate is for."""
    cert = None if anew else read_cert(layout.server_crt)
    key = None if anew else read_key(layout.server_key)
    if cert is None:
        _plan_new_server(plan, layout, ca, wanted, days, key, now)
        return wanted
    require_issued(layout, cert, ca)
    if key and key.public_key() != cert.public_key():
        raise UserError(
            f"{layout.server_key}: does not belong to server.crt; `fedtune provision renew -o "
            f"{layout.root}` makes both new"
        )
    hosts = hosts_of(layout.server_crt, cert)
    if wanted and set(wanted) != set(hosts):
        raise UserError(
            f"{layout.server_crt}: is for {', '.join(hosts)}, not {', '.join(wanted)}; change it with "
            f"`fedtune provision renew -o {layout.root} --host …`, or make everything new with --force"
        )
    plan.add(server_item(layout, cert, key is not None), new=False)
    return hosts


def plan_renewed_server(
    plan: ProvisionPlan,
    layout: Layout,
    ca: Ca,
    wanted: tuple[str, ...],
    within: int,
    days: int,
    now: datetime,
) -> tuple[str, ...]:
    """The hosts the certificate is for. A damaged one can be renewed too, when its hosts are given."""
    cert = None if wanted and damaged(layout.server_crt) else read_cert(layout.server_crt)
    hosts = wanted or (hosts_of(layout.server_crt, cert) if cert else ())
    if not hosts:
        raise UserError(f"{layout.server_crt}: is missing; say with --host what a new one is for")
    if cert is not None:
        require_issued(layout, cert, ca)
        if (
            not _due(cert, within, now)
            and set(hosts) == set(hosts_of(layout.server_crt, cert))
            and fits(layout.server_key, cert)
        ):
            plan.add(server_item(layout, cert, exists(layout.server_key)), new=False)
            return hosts
    _plan_new_server(plan, layout, ca, hosts, days, None, now)
    return hosts


def _plan_new_server(
    plan: ProvisionPlan,
    layout: Layout,
    ca: Ca,
    hosts: tuple[str, ...],
    days: int,
    key: Key | None,
    now: datetime,
) -> None:
    """`key`: one that an interrupted call left without a certificate."""
    ca_key = _required_key(layout, ca, "a server certificate")
    if ca.cert.not_valid_after_utc <= now:
        until = ca.cert.not_valid_after_utc
        raise UserError(
            f"{ca_path(layout)}: expired on {until:%Y-%m-%d}; renew it with `fedtune provision renew "
            f"-o {layout.root} --host …`"
        )
    if key is None:
        key = ec.generate_private_key(ec.SECP256R1())
        plan.secret(layout.server_key, key_pem(key))
    cert = issue_server(ca_key, ca.cert, key.public_key(), hosts, days, now)
    plan.public(layout.server_crt, cert_pem(cert))
    plan.add(server_item(layout, cert, True), new=True)


def plan_device(plan: ProvisionPlan, layout: Layout, ca: Ca, name: str, anew: bool) -> None:
    key = None if anew else read_device_key(layout.device_key(name))
    pub = None if anew else read_pub(layout.pub(name))
    item = Item(name, layout.device_key(name), "device")
    if pub is not None and key is None:
        plan.add(device_item(layout, name), new=False)
        return
    if pub is not None and key is not None and public_pem(pub) != public_pem(key.public_key()):
        raise UserError(
            f"{layout.device_key(name)}: does not belong to {layout.pub(name)}; "
            f"`fedtune provision renew -o {layout.root} --device {name}` makes both new"
        )
    if key is None:
        key = ec.generate_private_key(ec.SECP384R1())
        plan.secret(layout.device_key(name), key_openssh(key))
    if anew:
        plan.public(layout.device_ca(name), cert_pem(ca.cert))
    else:
        _plan_copy(plan, layout, ca, layout.device_ca(name))
    if pub is None:
        plan.public(layout.pub(name), pub_line(key.public_key(), name))
    plan.add(item, new=pub is None)


def _due(cert: x509.Certificate, within: int, now: datetime) -> bool:
    return cert.not_valid_after_utc <= now + timedelta(days=within)


def _required_key(layout: Layout, ca: Ca, for_what: str) -> Key:
    if ca.key is None:
        raise UserError(
            f"{layout.ca_key}: is not here (kept offline?), and {for_what} needs it; "
            "bring it back for this command"
        )
    return ca.key
