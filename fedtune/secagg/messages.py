"""The eight messages of a round as bytes. The only door for what comes from outside.

    4 bytes   magic "FTSA"
    1 byte    version, 1
    1 byte    kind, as in `Kind`
    16 bytes  session
    4 bytes   round
    2 bytes   sender: a client's index, or NOBODY for the coordinator and for clients before they have one
    rest      the body of that kind, below; nothing after it

    ASK_KEYS    nothing
    KEYS        public keys of the client: for sealing, for masks, 32 bytes each
    NEIGHBOURS  client's index 2, threshold 2, bits 1, length 4; table of 64: the keys of each neighbour
    SHARES      32 bytes to know the own seed by; table of 82: for each neighbour, its shares, sealed
    INBOX       table of 82: from each neighbour, shares, sealed
    MASKED      the vector, bits / 8 bytes a number
    SURVIVORS   table of 0: holders that sent a vector; table of 0: holders that did not
    OPENED      table of 33: shares of the seeds of the first; table of 33:
                shares of the mask keys of the second

A table is a count (2 bytes) and so many entries: a client's index (2 bytes), strictly rising, and the value.
All numbers are unsigned and little-endian. Every length follows from the kind and the counts, and is checked
before anything is read.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np

from fedtune.errors import Refused
from fedtune.secagg.keys import KEY, TAG
from fedtune.secagg.shamir import SHARE, value
from fedtune.secagg.terms import MAX_CLIENTS, MAX_NEIGHBOURS, Terms

MAGIC, VERSION, NOBODY = b"FTSA", 1, 0xFFFF
SEALED = 2 * SHARE + TAG
"""Bytes of a pair of shares once sealed."""
_HEADER = struct.Struct("<4sBB16sIH")
_PLACE = struct.Struct("<HHBI")


class Kind(IntEnum):
    ASK_KEYS, KEYS, NEIGHBOURS, SHARES, INBOX, MASKED, SURVIVORS, OPENED = range(8)


@dataclass(frozen=True)
class Keys:
    """A client's two public keys of a round."""

    sealing: bytes
    masking: bytes


@dataclass(frozen=True)
class Place:
    """A client's index in the round, how many holders open a secret,
    and the keys of its neighbours by index.
    """

    index: int
    threshold: int
    keys: dict[int, Keys]


def kind_of(data: bytes) -> Kind:
    """The kind a message claims, for a transport that has to choose who reads it.

    Raises Refused when it is not one of ours.
    """
    _require(len(data) >= _HEADER.size, "size", f"{len(data)} bytes, a message has at least {_HEADER.size}")
    magic, version, kind = struct.unpack_from("<4sBB", data)
    _require(magic == MAGIC, "magic", f"starts with {magic!r}, not {MAGIC!r}")
    _require(version == VERSION, "version", f"{version}, this is {VERSION}")
    _require(kind in Kind.__members__.values(), "kind", f"{kind} is none of the {len(Kind)}")
    return Kind(kind)


def ask_keys(terms: Terms) -> bytes:
    return _message(Kind.ASK_KEYS, terms, NOBODY)


def read_ask_keys(data: bytes, terms: Terms) -> None:
    _end(_body(data, Kind.ASK_KEYS, terms, NOBODY))


def keys(terms: Terms, found: Keys) -> bytes:
    return _message(Kind.KEYS, terms, NOBODY, found.sealing, found.masking)


def read_keys(data: bytes, terms: Terms) -> Keys:
    body = _body(data, Kind.KEYS, terms, NOBODY)
    _require(len(body) == 2 * KEY, "size", f"{len(body)} bytes of keys, must be {2 * KEY}")
    return Keys(bytes(body[:KEY]), bytes(body[KEY:]))


def place(terms: Terms, found: Place) -> bytes:
    facts = _PLACE.pack(found.index, found.threshold, terms.bits, terms.length)
    return _message(
        Kind.NEIGHBOURS,
        terms,
        NOBODY,
        facts,
        _table({i: k.sealing + k.masking for i, k in found.keys.items()}),
    )


def read_place(data: bytes, terms: Terms) -> Place:
    body = _body(data, Kind.NEIGHBOURS, terms, NOBODY)
    _require(len(body) >= _PLACE.size, "size", f"{len(body)} bytes, too few for a client's place")
    index, threshold, bits, length = _PLACE.unpack_from(body)
    _require(index < MAX_CLIENTS, "neighbours", f"index {index}, must be below {MAX_CLIENTS}")
    _require(
        (bits, length) == (terms.bits, terms.length),
        "terms",
        f"{length} numbers of {bits} bits, this client has {terms.length} of {terms.bits}",
    )
    table, rest = _read_table(body[_PLACE.size :], 2 * KEY)
    _end(rest)
    return Place(index, threshold, {i: Keys(k[:KEY], k[KEY:]) for i, k in table.items()})


def shares(terms: Terms, sender: int, check: bytes, sealed: Mapping[int, bytes]) -> bytes:
    return _message(Kind.SHARES, terms, sender, check, _table(sealed))


def read_shares(data: bytes, terms: Terms, sender: int) -> tuple[bytes, dict[int, bytes]]:
    """(check, sealed shares by receiver)."""
    body = _body(data, Kind.SHARES, terms, sender)
    _require(len(body) >= KEY, "size", f"{len(body)} bytes of shares, too few")
    table, rest = _read_table(body[KEY:], SEALED)
    _end(rest)
    return bytes(body[:KEY]), table


def inbox(terms: Terms, sealed: Mapping[int, bytes]) -> bytes:
    return _message(Kind.INBOX, terms, NOBODY, _table(sealed))


def read_inbox(data: bytes, terms: Terms) -> dict[int, bytes]:
    """Sealed shares by sender."""
    table, rest = _read_table(_body(data, Kind.INBOX, terms, NOBODY), SEALED)
    _end(rest)
    return table


def masked(terms: Terms, sender: int, vector: np.ndarray) -> bytes:
    return _message(Kind.MASKED, terms, sender, vector.astype(terms.dtype, copy=False).tobytes())


def read_masked(data: bytes, terms: Terms, sender: int) -> np.ndarray:
    """[length], read-only, lying in `data`."""
    body = _body(data, Kind.MASKED, terms, sender)
    _require(len(body) == terms.size, "size", f"{len(body)} bytes of vector, must be {terms.size}")
    return np.frombuffer(body, terms.dtype)


def survivors(terms: Terms, there: Sequence[int], gone: Sequence[int]) -> bytes:
    return _message(
        Kind.SURVIVORS, terms, NOBODY, *(_table(dict.fromkeys(indices, b"")) for indices in (there, gone))
    )


def read_survivors(data: bytes, terms: Terms) -> tuple[frozenset[int], frozenset[int]]:
    """(holders that sent a vector, holders that did not). Nothing is checked about who they are."""
    there, rest = _read_table(_body(data, Kind.SURVIVORS, terms, NOBODY), 0)
    gone, rest = _read_table(rest, 0)
    _end(rest)
    return frozenset(there), frozenset(gone)


def opened(terms: Terms, sender: int, seeds: Mapping[int, bytes], mask_keys: Mapping[int, bytes]) -> bytes:
    return _message(Kind.OPENED, terms, sender, _table(seeds), _table(mask_keys))


def read_opened(data: bytes, terms: Terms, sender: int) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """(shares of own seeds, shares of mask keys), by whose they are; each a number of the field."""
    seeds, rest = _read_table(_body(data, Kind.OPENED, terms, sender), SHARE)
    mask_keys, rest = _read_table(rest, SHARE)
    _end(rest)
    for share in (*seeds.values(), *mask_keys.values()):
        value(share)
    return seeds, mask_keys


def _message(kind: Kind, terms: Terms, sender: int, *parts: bytes) -> bytes:
    return b"".join((_HEADER.pack(MAGIC, VERSION, kind, terms.session, terms.round, sender), *parts))


def _body(data: bytes, kind: Kind, terms: Terms, sender: int) -> memoryview:
    found = kind_of(data)
    *_, session, round, claimed = _HEADER.unpack_from(data)
    _require(found == kind, "kind", f"{found.name}, expected {kind.name}")
    _require(session == terms.session, "session", "a message of another session")
    _require(round == terms.round, "round", f"a message of round {round}, this is {terms.round}")
    _require(claimed == sender, "sender", f"says it is from {claimed}, expected {sender}")
    return memoryview(data)[_HEADER.size :]


def _table(entries: Mapping[int, bytes]) -> bytes:
    rows = (struct.pack("<H", index) + entries[index] for index in sorted(entries))
    return b"".join((struct.pack("<H", len(entries)), *rows))


def _read_table(body: memoryview, width: int) -> tuple[dict[int, bytes], memoryview]:
    """Entries of `width` bytes by index, and what follows the table."""
    _require(len(body) >= 2, "size", "ends before a table does")
    count, step = int.from_bytes(body[:2], "little"), 2 + width
    end = 2 + count * step
    _require(
        count <= MAX_NEIGHBOURS + 1, "size", f"a table of {count}, at most {MAX_NEIGHBOURS + 1} are taken"
    )
    _require(len(body) >= end, "size", f"ends before a table of {count} does")
    rows = [bytes(body[i : i + step]) for i in range(2, end, step)]
    indices = [int.from_bytes(row[:2], "little") for row in rows]
    _require(all(a < b for a, b in pairwise(indices)), "duplicate", "indices repeat or are out of order")
    _require(
        not indices or indices[-1] < MAX_CLIENTS,
        "client",
        f"index {indices[-1] if indices else 0}, must be below {MAX_CLIENTS}",
    )
    return {index: row[2:] for index, row in zip(indices, rows)}, body[end:]


def _end(rest: memoryview) -> None:
    _require(not rest, "size", f"{len(rest)} bytes too many")


def _require(condition: bool, reason: str, message: str) -> None:
    if not condition:
        raise Refused(reason, message)
