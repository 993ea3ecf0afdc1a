"""Any t shares give the secret back, in any order; fewer say nothing; what is wrong is refused."""

import secrets

import pytest
from Crypto.Math import Primality
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import Refused
from fedtune.secagg.shamir import PRIME, SHARE, combine, split, value, weights_at_zero

SECRETS = st.binary(min_size=32, max_size=32)
POINTS = st.lists(st.integers(1, 2**32), min_size=1, max_size=12, unique=True)


@settings(max_examples=200, deadline=None)
@given(SECRETS, POINTS, st.data())
def test_any_t_shares_give_the_secret_back(secret, points, data):
    threshold = data.draw(st.integers(1, len(points)))
    shares = split(secret, threshold, points)
    chosen = data.draw(st.permutations(points))[:threshold]
    assert combine([(x, shares[x]) for x in chosen], threshold) == secret
    assert all(len(share) == SHARE for share in shares.values())


@settings(max_examples=100, deadline=None)
@given(SECRETS, SECRETS, st.integers(2, 8))
def test_fewer_shares_fit_every_secret(secret, other, threshold):
    """t - 1 shares and any other secret lie on one polynomial, whose further value is a valid share."""
    shares = split(secret, threshold, range(1, threshold + 1))
    known = {x: value(shares[x]) for x in range(1, threshold)}
    through = list(known)
    weights = weights_at_zero([*through, threshold])
    missing = (
        (int.from_bytes(other, "little") - sum(weights[x] * known[x] for x in through))
        * pow(weights[threshold], -1, PRIME)
        % PRIME
    )
    forged = [(x, shares[x]) for x in through] + [(threshold, missing.to_bytes(SHARE, "little"))]
    assert combine(forged, threshold) == other


def test_by_hand():
    """3 + 5x at 1 and 2 is 8 and 13."""
    shares = [(1, (8).to_bytes(SHARE, "little")), (2, (13).to_bytes(SHARE, "little"))]
    assert combine(shares, 2) == (3).to_bytes(32, "little")


def test_the_modulus_is_a_prime_above_every_secret():
    assert (
        Primality.test_probable_prime(PRIME) == Primality.PROBABLY_PRIME
        and PRIME > 2**256 > 2 ** (8 * SHARE) // PRIME
    )


def test_shares_of_one_secret_differ_each_time():
    secret = secrets.token_bytes(32)
    assert split(secret, 2, [1, 2]) != split(secret, 2, [1, 2])
    # a threshold of one hides nothing; no client takes it
    assert split(secret, 1, [7]) == {7: secret + b"\0"}


SHARES = [(x, share) for x, share in split(bytes(32), 3, [1, 2, 3, 4]).items()]


@pytest.mark.parametrize(
    "shares",
    [
        SHARES[:2],
        SHARES,
        [SHARES[0], SHARES[1], SHARES[0]],
        [SHARES[0], SHARES[1], (2, SHARES[2][1])],
        [SHARES[0], SHARES[1], (0, SHARES[2][1])],
        [SHARES[0], SHARES[1], (-1, SHARES[2][1])],
        [SHARES[0], SHARES[1], (3, SHARES[2][1][:-1])],
        [SHARES[0], SHARES[1], (3, PRIME.to_bytes(SHARE, "little"))],
        [(1, (PRIME - 1).to_bytes(SHARE, "little"))] * 1
        + [(2, (PRIME - 1).to_bytes(SHARE, "little")), (3, (PRIME - 1).to_bytes(SHARE, "little"))],
    ],
    ids=[
        "few",
        "many",
        "same twice",
        "replayed under another's number",
        "number 0",
        "number below 0",
        "short",
        "too large",
        "no secret",
    ],
)
def test_wrong_shares_are_refused(shares):
    with pytest.raises(Refused) as e:
        combine(shares, 3)
    assert e.value.reason == "share"


@pytest.mark.parametrize(
    "secret, threshold, points",
    [
        (bytes(31), 1, [1]),
        (bytes(32), 0, [1]),
        (bytes(32), 3, [1, 2]),
        (bytes(32), 1, [1, 1]),
        (bytes(32), 1, [0]),
        (bytes(32), 1, [2**32 + 1]),
    ],
)
def test_wrong_arguments_are_refused(secret, threshold, points):
    with pytest.raises(ValueError):
        split(secret, threshold, points)
