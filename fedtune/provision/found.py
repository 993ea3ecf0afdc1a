"""What lies under a root now: the CA, the server certificate and the devices, each as an item."""

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedtune.errors import UserError
from fedtune.provision.certificates import ANEW, Key, hosts_of, is_ca, read_cert, read_key
from fedtune.provision.files import exists
from fedtune.provision.layout import Item, Layout


@dataclass(frozen=True)
class Ca:
    """`key` is None while it is kept offline."""

    key: Key | None
    cert: x509.Certificate


def read_ca(layout: Layout, with_key: bool = True) -> Ca | None:
    """The newest certificate of the CA in its own folder or the server's, and its key if that is here;
    None without a certificate.
    """
    certs = {
        path: cert for path in (layout.ca_crt, layout.server_ca) if (cert := read_cert(path)) is not None
    }
    if not certs:
        return None
    key = read_key(layout.ca_key) if with_key else None
    first = next(iter(certs))
    for path, cert in certs.items():
        if not is_ca(cert):
            raise UserError(f"{path}: not the certificate of a CA; {ANEW}")
        if key and key.public_key() != cert.public_key():
            raise UserError(f"{layout.ca_key}: does not belong to {path}; {ANEW}")
        if cert.public_key() != certs[first].public_key():
            raise UserError(f"{path}: is of another CA than {first}; {ANEW}")
    return Ca(key, max(certs.values(), key=lambda cert: cert.not_valid_after_utc))


def ca_path(layout: Layout) -> Path:
    return layout.server_ca if exists(layout.server_ca) and not exists(layout.ca_crt) else layout.ca_crt


def ca_item(layout: Layout, ca: Ca) -> Item:
    return Item(
        "CA",
        ca_path(layout),
        "ca",
        ca.cert.not_valid_after_utc,
        has_key=ca.key is not None or exists(layout.ca_key),
    )


def server_item(layout: Layout, cert: x509.Certificate, has_key: bool) -> Item:
    return Item(
        "server",
        layout.server_crt,
        "server",
        cert.not_valid_after_utc,
        hosts_of(layout.server_crt, cert),
        has_key,
    )


def server_items(layout: Layout) -> list[Item]:
    """The server certificate, if there is one."""
    cert = read_cert(layout.server_crt)
    return [server_item(layout, cert, exists(layout.server_key))] if cert else []


def device_item(layout: Layout, name: str) -> Item:
    has_key = exists(layout.device_key(name))
    return Item(name, layout.device_key(name) if has_key else layout.pub(name), "device", has_key=has_key)


def require_issued(layout: Layout, cert: x509.Certificate, ca: Ca) -> None:
    try:
        cert.verify_directly_issued_by(ca.cert)
    except (ValueError, TypeError, InvalidSignature):
        raise UserError(
            f"{layout.server_crt}: was not signed by the CA in {ca_path(layout)}; {ANEW}"
        ) from None
