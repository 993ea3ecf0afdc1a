"""Key pairs, what two of them agree on, and boxes that only one neighbour opens.

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), ChaCha20-Poly1305 (RFC 8439), all from `cryptography`.
"""

from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedtune.errors import Refused
from fedtune.secagg.terms import Terms

KEY, TAG = 32, 16
"""Bytes of a key, public, private or derived, and of what sealing adds."""


@dataclass(frozen=True)
class Pair:
    """A private key and its public half (32 bytes)."""

    private: X25519PrivateKey = field(repr=False)
    public: bytes


def new_pair() -> Pair:
    """Fresh, from the operating system's randomness."""
    return _pair(X25519PrivateKey.generate())


def pair_from(secret: bytes) -> Pair:
    """The pair whose private key is these 32 bytes (`secret_of`)."""
    return _pair(X25519PrivateKey.from_private_bytes(secret))


def secret_of(pair: Pair) -> bytes:
    """The private key as 32 bytes, to be shared."""
    return pair.private.private_bytes_raw()


def _pair(private: X25519PrivateKey) -> Pair:
    return Pair(private, private.public_key().public_bytes_raw())


def agree(mine: Pair, public: bytes) -> bytes:
    """The 32 bytes both sides get; derive from them, do not use them.

    Raises Refused("key") for a public key on which all would agree alike.
    """
    try:
        return mine.private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise Refused("key", "a public key is no usable point of Curve25519") from None


def require_usable(public: bytes) -> None:
    """Raises Refused("key") for a public key that every other client would refuse,
    so that one bad key costs one client.
    """
    agree(new_pair(), public)


def derive(secret: bytes, label: bytes) -> bytes:
    """32 bytes for one purpose: HKDF-SHA256 without salt, `label` as its info."""
    return HKDF(SHA256(), KEY, None, label).derive(secret)


def seal(secret: bytes, label: bytes, plain: bytes) -> bytes:
    """`plain`, readable and changeable only with the same secret and label; 16 bytes longer."""
    return ChaCha20Poly1305(derive(secret, label)).encrypt(_NONCE, plain, label)


def unseal(secret: bytes, label: bytes, sealed: bytes) -> bytes:
    """What was sealed.

    Raises Refused("share") when it was sealed with another secret, for another label, or changed since.
    """
    try:
        return ChaCha20Poly1305(derive(secret, label)).decrypt(_NONCE, sealed, label)
    except InvalidTag:
        raise Refused(
            "share", "a sealed share was not made for this client, pair, round and session, or was changed"
        ) from None


def own_mask(seed: bytes, terms: Terms, index: int) -> bytes:
    """The seed of a client's own mask, from its 32-byte secret."""
    return derive(seed, terms.label("own mask", index))


def own_check(seed: bytes, terms: Terms, index: int) -> bytes:
    """32 bytes by which a rebuilt secret is known to be the right one;
    they say nothing about it or the mask (HKDF as a PRF).
    """
    return derive(seed, terms.label("own check", index))


def pair_mask(mine: Pair, index: int, public: bytes, other: int, terms: Terms) -> bytes:
    """The seed of the mask between two clients, the same from either side. Raises Refused as `agree`."""
    (low, first), (high, second) = sorted([(index, mine.public), (other, public)])
    return derive(agree(mine, public), terms.label("pair mask", low, high, keys=(first, second)))


def share_label(terms: Terms, sender: int, sender_key: bytes, receiver: int, receiver_key: bytes) -> bytes:
    """The label under which one client seals shares for another."""
    return terms.label("share", sender, receiver, keys=(sender_key, receiver_key))


# a label holds round, direction and both fresh public keys, and a client seals once a
# round: no key seals twice
_NONCE = bytes(12)
