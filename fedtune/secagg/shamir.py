"""Shamir's secret sharing of 32 bytes over a prime field.

Shamir 1979, CACM 22(11), "How to share a secret". Fewer than t shares say nothing about the secret,
whatever the computing power.

Why not `Crypto.Protocol.SecretSharing` of pycryptodome: it shares 16 bytes in GF(2^128), so a key needs two
runs and the check that halves belong together; it takes share number 0, which is the secret itself; and its
Python loop over bits makes the shares of a hundred clients a matter of seconds. Neither it nor this detects a
wrong share by itself: `reveal` checks what comes out.
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence

from fedtune.errors import Refused

PRIME = 2**256 + 297
"""Above every value of 32 bytes."""
SECRET, SHARE = 32, 33
"""Bytes of a secret and of a share, which can be as large as PRIME - 1."""


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """One share (33 bytes, little-endian) by point; any `threshold` of them give the secret back.

    Raises ValueError for a secret that is not 32 bytes, for points that repeat or are not 1 to 2^32, and
    unless 1 <= threshold <= number of points.
    """
    if len(secret) != SECRET:
        raise ValueError(f"a secret of {len(secret)} bytes, must be {SECRET}")
    if len(set(points)) != len(points) or not all(1 <= x <= 2**32 for x in points):
        raise ValueError("points of shares must differ and be 1 to 2^32")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold {threshold} of {len(points)} shares: must be 1 to {len(points)}")
    polynomial = [*(secrets.randbelow(PRIME) for _ in range(threshold - 1)), int.from_bytes(secret, "little")]
    return {x: _at(polynomial, x).to_bytes(SHARE, "little") for x in points}


def combine(
    shares: Iterable[tuple[int, bytes]], threshold: int, weights: Mapping[int, int] | None = None
) -> bytes:
    """The secret (32 bytes) from exactly `threshold` (point, share) pairs.

    weights: `weights_at_zero` of the points, when the caller has them from another
    secret with the same points.

    Raises Refused("share") when there are fewer or more, a point repeats, a share is out of bounds, or what
    comes out cannot be a secret. Wrong shares within the bounds give a wrong secret.
    """
    pairs = list(shares)
    found = {x: value(share) for x, share in pairs}
    if len(found) != len(pairs):
        raise Refused("share", "two shares of one secret have the same number")
    if len(pairs) != threshold:
        raise Refused("share", f"{len(pairs)} shares of a secret that takes {threshold}")
    weights = weights or weights_at_zero(list(found))
    secret = sum(weights[x] * y for x, y in found.items()) % PRIME
    if secret >> (8 * SECRET):
        raise Refused("share", "the shares do not belong to one secret")
    return secret.to_bytes(SECRET, "little")


def weights_at_zero(points: Sequence[int]) -> dict[int, int]:
    """Lagrange's weights: the value at 0 is the sum of weight * value over the points, modulo PRIME."""
    if len(set(points)) != len(points) or not all(1 <= x <= 2**32 for x in points):
        raise Refused("share", "numbers of shares must differ and be 1 to 2^32")
    weights = {}
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        weights[x] = above * pow(below, -1, PRIME) % PRIME
    return weights


def value(share: bytes) -> int:
    """A share as a number below PRIME. Raises Refused("share")."""
    number = int.from_bytes(share, "little")
    if len(share) != SHARE or number >= PRIME:
        raise Refused("share", f"not a share: {len(share)} bytes, or too large a number")
    return number


def _at(polynomial: Sequence[int], x: int) -> int:
    """Horner's rule; the constant comes last."""
    total = 0
    for coefficient in polynomial:
        total = (total * x + coefficient) % PRIME
    return total
