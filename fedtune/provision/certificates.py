"""Makes and reads keys and certificates: x509, PEM and OpenSSH, and nothing of where they belong."""

import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.errors import UserError
from fedtune.provision.files import read
from fedtune.provision.names import as_address

# a device whose clock is a little behind must not find the certificate too young
BACKDATED = timedelta(minutes=10)
ANEW = "restore it from a copy, or make everything new with --force"

# not the certificates and tokens named alike
_SSH_KINDS = (b"ecdsa-sha2-nistp256", b"ecdsa-sha2-nistp384", b"ecdsa-sha2-nistp521")

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def issue_ca(key: Key, days: int, now: datetime) -> x509.Certificate:
    """Self-signed.

    The name comes from the key, so a renewed certificate bears the name that those signed before it look for.
    """
    name = _named(f"fedtune CA {hashlib.sha256(public_pem(key.public_key())).hexdigest()[:12]}")
    usage = _usage(digital_signature=False, signs_certificates=True)
    made = _builder(name, name, key.public_key(), key, now, now + timedelta(days=days))
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).add_extension(
        usage, critical=True
    )
    return made.sign(key, hashes.SHA256())


def issue_server(
    ca_key: Key, ca: x509.Certificate, key: PublicKey, hosts: Sequence[str], days: int, now: datetime
) -> x509.Certificate:
    """Good for so many days, or until the CA ends."""
    until = min(now + timedelta(days=days), ca.not_valid_after_utc)
    names = [
        x509.IPAddress(address) if (address := as_address(host)) else x509.DNSName(host) for host in hosts
    ]
    made = _builder(_named("fedtune server"), ca.subject, key, ca_key, now, until)
    made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    made = made.add_extension(_usage(digital_signature=True, signs_certificates=False), critical=True)
    made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return made.sign(ca_key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PublicKey, ca_key: Key, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    """What both certificates have.

    The authority is named by its key alone: a serial number would tie it to one issue of the CA.
    """
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
    )
    made = made.not_valid_before(now - BACKDATED).not_valid_after(until)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    return made.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
    )


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(digital_signature: bool, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def cert_pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def key_pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_openssh(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def public_pem(key: PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def pub_line(key: PublicKey, name: str) -> bytes:
    return (
        key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        + f" {name}\n".encode()
    )


def read_cert(path: Path) -> x509.Certificate | None:
    data = read(path)
    if data is None:
        return None
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError:
        raise UserError(f"{path}: not a certificate in PEM form; {ANEW}") from None


def days_left(path: Path, now: datetime | None = None) -> float | None:
    """Days until the certificate expires, below 0 when it has; None where there is none."""
    cert = read_cert(path)
    return (
        None
        if cert is None
        else (cert.not_valid_after_utc - (now or datetime.now(UTC))).total_seconds() / 86_400
    )


def read_key(path: Path) -> Key | None:
    return _read_private(path, serialization.load_pem_private_key, f"PEM form without a passphrase; {ANEW}")


def read_device_key(path: Path) -> Key | None:
    mend = f"restore it, or `fedtune provision renew --device {path.parent.name}`"
    return _read_private(
        path, serialization.load_ssh_private_key, f"OpenSSH form without a passphrase; {mend}"
    )


def _read_private(path: Path, load: Callable[[bytes, None], object], form: str) -> Key | None:
    data = read(path)
    if data is None:
        return None
    try:
        key = load(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Key):
        raise UserError(f"{path}: not an EC private key in {form}")
    return key


def read_pub(path: Path) -> PublicKey | None:
    data = read(path)
    return None if data is None else parse_pub(path, data)


def parse_pub(path: Path, data: bytes) -> PublicKey:
    lines = [line for line in data.split(b"\n") if line.strip()]
    try:
        if len(lines) == 1 and lines[0].split()[0] in _SSH_KINDS:
            key = serialization.load_ssh_public_key(lines[0])
            if isinstance(key, PublicKey):
                return key
    except (ValueError, UnsupportedAlgorithm):
        pass
    raise UserError(
        f"{path}: not one EC public key in OpenSSH form (a line ecdsa-sha2-nistp384 …); "
        f"`fedtune provision renew --device {path.stem}` makes it new"
    )


def is_ca(cert: x509.Certificate) -> bool:
    try:
        return cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def hosts_of(path: Path, cert: x509.Certificate) -> tuple[str, ...]:
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        raise UserError(f"{path}: names no hosts, so fedtune did not make it; {ANEW}") from None
    return tuple(str(name.value) for name in names)


def fits(path: Path, cert: x509.Certificate) -> bool:
    """Whether the key at `path` is the certificate's. An absent one is: it was delivered with it."""
    try:
        key = read_key(path)
    except UserError:
        return False
    return key is None or key.public_key() == cert.public_key()


def damaged(path: Path) -> bool:
    try:
        read_cert(path)
    except UserError:
        return True
    return False
