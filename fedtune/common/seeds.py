"""Randomness by name: one generator for each (seed, round, client, purpose),
so that order and resuming change nothing.
"""

import hashlib

import numpy as np


def generator(seed: int, purpose: str, round: int = 0, client: str = "") -> np.random.Generator:
    """A counter-based generator (Philox) keyed by the hash of its name.

    The same arguments give the same stream on every machine and in any order of calls; different arguments
    give independent streams. Not for privacy noise, which comes from the operating system.
    """
    name = f"{seed}\x1f{purpose}\x1f{round}\x1f{client}".encode()
    key = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))
