"""What client and coordinator know of a round before its first message,
and the names under which secrets are derived.
"""

import hashlib
import struct
from dataclasses import dataclass

import numpy as np

MAX_CLIENTS = 2**15
"""Most clients in a round: their indices fit 16 bits, and one value is left to mean "no index"."""
MAX_NEIGHBOURS = 1024
MAX_LENGTH = 2**26
"""Most numbers in a vector. 2^26 of 64 bits are 2^23 blocks of ChaCha20,
far from the 2^32 at which its counter wraps.
"""
STAGES = ("keys", "shares", "masked", "unmask")
"""The questions of a round in order; also the names of the methods of `ClientRound` that answer them."""


@dataclass(frozen=True)
class Terms:
    """One round of one run.

    session: 16 bytes that name the run, the same for all its rounds and for no other run. round: 0
    to 2^32 - 1. length: numbers in a vector. bits: 32 or 64, of the modulus 2^bits. Raises
    ValueError for anything else.
    """

    session: bytes
    round: int
    length: int
    bits: int

    def __post_init__(self) -> None:
        _require(
            isinstance(self.session, bytes) and len(self.session) == 16,
            f"session: {len(self.session)} bytes, must be 16",
        )
        _require(0 <= self.round < 2**32, f"round: {self.round}, must be 0 to 2^32 - 1")
        _require(1 <= self.length <= MAX_LENGTH, f"length: {self.length} numbers, must be 1 to {MAX_LENGTH}")
        _require(self.bits in (32, 64), f"bits: {self.bits}, must be 32 or 64")

    @property
    def dtype(self) -> np.dtype:
        """Of a vector: unsigned, little-endian, as it travels."""
        return np.dtype(f"<u{self.bits // 8}")

    @property
    def size(self) -> int:
        """Bytes of a vector."""
        return self.length * self.bits // 8

    def label(self, purpose: str, *indices: int, keys: tuple[bytes, ...] = ()) -> bytes:
        """The name of one derived secret, for HKDF's info: protocol, purpose, session, round,
        modulus, indices, public keys.

        A purpose always comes with the same number of indices and keys, so no two secrets have the same name.
        """
        facts = struct.pack(
            f"<16sIBI{len(indices)}H", self.session, self.round, self.bits, self.length, *indices
        )
        return b"fedtune secagg 1 " + purpose.encode() + b"\0" + facts + b"".join(keys)


def session_of(name: str) -> bytes:
    """The 16 bytes of a session from what names the run: the digest of its bundle."""
    return hashlib.sha256(b"fedtune secagg session " + name.encode()).digest()[:16]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
