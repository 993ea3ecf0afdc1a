"""HOST:PORT as people type it."""

import socket

from fedtune.errors import UserError


def parse_address(text: str) -> tuple[str, int]:
    """("host", port) of HOST:PORT or [IPv6]:PORT. Raises UserError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") and host.endswith("]") else host
    if (
        not colon
        or not host
        or not port.isdecimal()
        or not 1 <= int(port) <= 65535
        or "/" in host
        or (":" in host and not text.startswith("["))
    ):
        raise UserError(
            f"address {text!r}: must be HOST:PORT with a port of 1 to 65535, for example "
            "192.0.2.7:9092 or [2001:db8::7]:9092"
        )
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine.

    Names other than localhost are not looked up.
    """
    if host == "localhost":
        return True
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            packed = socket.inet_pton(family, host)
        except OSError:
            continue
        return packed[0] == 127 if family == socket.AF_INET else packed == bytes(15) + b"\x01"
    return False
