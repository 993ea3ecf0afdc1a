"""A device's first look at the coordinator: is it there, and is it the one whose certificate we trust.

No Flower here.
"""

import socket
import ssl
from pathlib import Path

from fedtune.errors import UserError
from fedtune.process.address import parse_address
from fedtune.process.waits import CONNECT_SECONDS


class Unreachable(Exception):
    """Nobody answers there now; it may be worth trying again."""


def look(address: str, ca: Path | None) -> None:
    """Connects, and with `ca` shakes hands, then hangs up.

    Raises Unreachable when nobody answers, or only the time is wrong; UserError when somebody does who cannot
    be trusted: that will not mend itself.
    """
    host, port = parse_address(address)
    try:
        with socket.create_connection((host, port), CONNECT_SECONDS) as plain:
            if ca is not None:
                plain.settimeout(CONNECT_SECONDS)
                with _context(ca).wrap_socket(plain, server_hostname=host):
                    pass
    except ssl.SSLCertVerificationError as e:
        if trouble := _in_time(address, e):
            raise Unreachable(trouble) from None
        raise UserError(_untrusted(address, ca, e)) from None
    except ssl.SSLError as e:
        if e.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            raise UserError(
                f"{address}: does not speak TLS; is it the coordinator's port, and was it "
                "started without --insecure?"
            ) from None
        raise Unreachable(f"{address}: the TLS handshake failed ({e.reason or e})") from None
    except OSError as e:
        raise Unreachable(f"{address}: {e.strerror or e}") from None


def _context(ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as e:
        raise UserError(
            f"{ca}: cannot be used as the coordinator's authority ({e}); "
            "copy ca.crt from the folder that `fedtune provision` made"
        ) from None
    return context


def _in_time(address: str, error: ssl.SSLCertVerificationError) -> str:
    """What will mend itself: a certificate that is renewed, a clock that is set."""
    if "expired" in error.verify_message:
        return (
            f"{address}: its certificate has expired; renew it on the coordinator "
            "with `fedtune provision renew`"
        )
    if "not yet valid" in error.verify_message:
        return f"{address}: its certificate is not valid yet; check this device's clock"
    return ""


def _untrusted(address: str, ca: Path | None, error: ssl.SSLCertVerificationError) -> str:
    message = error.verify_message.rstrip(".")
    if "mismatch" in message or "not valid for" in message:
        return (
            f"{address}: its certificate is for other hosts ({message}); connect under a name it holds, "
            "or provision it with --host"
        )
    return (
        f"{address}: its certificate was not signed by the authority in {ca} ({message}); "
        "copy the ca.crt that belongs to this coordinator"
    )
