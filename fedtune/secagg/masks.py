"""Masks: a 32-byte seed stretched to a vector. And the sum that all of this amounts to."""

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedtune.secagg.terms import Terms

_STRETCH = 2**16
_ZEROS = bytes(_STRETCH)


def add_mask(total: np.ndarray, seed: bytes, *, minus: bool = False) -> None:
    """Adds PRG(seed), or takes it away, in place, modulo 2^k.

    total: [n] uint32 or uint64. PRG(seed): the keystream of ChaCha20 (RFC 8439) with the seed as its key,
    nonce and counter 0, read as little-endian numbers. A seed serves one mask, so the nonce need not vary. In
    stretches that fit a core's cache.
    """
    stream, buffer = Cipher(algorithms.ChaCha20(seed, bytes(16)), None).encryptor(), bytearray(_STRETCH)
    mask = np.frombuffer(buffer, total.dtype.newbyteorder("<"))
    change = np.subtract if minus else np.add
    for start in range(0, total.size, mask.size):
        part = total[start : start + mask.size]
        stream.update_into(_ZEROS, buffer)
        change(part, mask[: part.size], out=part)


def sum_plainly(vectors: Iterable[np.ndarray], terms: Terms) -> np.ndarray:
    """[length], the sum modulo 2^bits, without masks: the twin that a round of the protocol must equal bit
    for bit, for simulations.
    """
    total = np.zeros(terms.length, terms.dtype)
    for vector in vectors:
        require_vector(vector, terms)
        total += vector
    return total


def require_vector(vector: np.ndarray, terms: Terms) -> None:
    """Raises ValueError unless it is [length] of unsigned numbers of so many bits."""
    if vector.dtype != terms.dtype or vector.shape != (terms.length,):
        raise ValueError(
            f"a vector {vector.dtype} {list(vector.shape)}: must be {terms.dtype} [{terms.length}]"
        )
