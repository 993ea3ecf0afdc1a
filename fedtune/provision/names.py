"""Hosts and device names as people type them: checked, put in canonical form, and shown in short."""

import difflib
import ipaddress
import re
from collections.abc import Sequence

from fedtune.errors import UserError

MAX_DEVICES = 10_000
ALWAYS = ("localhost", "127.0.0.1", "::1")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NO_HOST = "no host: give --host with the name or IP address devices reach the coordinator under"

_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def device_names(count: int | None, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """device-001 … for `count`, then `extra`.

    Raises UserError for a count out of range, no device at all, and bad or repeated names.
    """
    if count is not None and not 0 <= count <= MAX_DEVICES:
        raise UserError(f"--devices {count}: give 1 to {MAX_DEVICES}")
    if not count and not extra:
        raise UserError(
            f"{'--devices 0' if count == 0 else 'no device'}: give --devices 1 "
            f"to {MAX_DEVICES}, or --device NAME"
        )
    return check_names([*(f"device-{i:03d}" for i in range(1, (count or 0) + 1)), *extra])


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Device names as given.

    Raises UserError for one that is not a plain file name, and for two that differ in case at most.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(
                f"device name {_short(name)}: give letters, digits and . _ - (at most 64, "
                "the first a letter or digit)"
            )
        if name.casefold() in seen:
            raise _twin(name, seen[name.casefold()])
        seen[name.casefold()] = name
    return tuple(names)


def refuse_twins(names: Sequence[str], known: Sequence[str]) -> None:
    folded = {name.casefold(): name for name in known}
    for name in names:
        other = folded.get(name.casefold(), name)
        if other != name:
            raise _twin(name, other)


def require_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"--device {name}: not known here; {hint}`fedtune provision show` lists all, "
                f"`fedtune provision --device {name}` adds it"
            )


def names_in_short(names: Sequence[str]) -> str:
    """All of them, or the first and the last of many."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} … {names[-1]}"


def sans(hosts: Sequence[str]) -> tuple[str, ...]:
    """The names a server certificate is for: `hosts` in order, then localhost and the loopback addresses;
    each once, in canonical form.

    Raises UserError for what is neither a DNS name nor an IP address, and for no host at all.
    """
    if not hosts:
        raise UserError(NO_HOST)
    return tuple(dict.fromkeys([*(check_host(host) for host in hosts), *ALWAYS]))


def check_host(text: str) -> str:
    """A DNS name in lower case, or an IP address in canonical form.

    Raises UserError that says what is wrong with `text`.
    """
    address = as_address(text)
    if address is not None:
        if "%" in text or address.is_unspecified or address.is_multicast:
            raise UserError(
                f"--host {_short(text)}: not an address devices can reach; "
                "give the coordinator's own, or its DNS name"
            )
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


def as_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:60] + "…")


def _twin(name: str, other: str) -> UserError:
    if name == other:
        return UserError(f"device name {name!r}: given twice; give each once")
    return UserError(
        f"device name {name!r}: differs from {other!r} in upper and lower case only; choose another name"
    )
