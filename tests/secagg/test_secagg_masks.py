"""Known answers for every primitive, from RFCs and from a second library; masked vectors look like noise."""

import hashlib
import hmac

import numpy as np
import pytest
from Crypto.Cipher import ChaCha20, ChaCha20_Poly1305
from secagg_rounds import Cohort, terms

from fedtune.secagg import messages
from fedtune.secagg.keys import (
    agree,
    derive,
    new_pair,
    own_check,
    own_mask,
    pair_from,
    pair_mask,
    seal,
    secret_of,
)
from fedtune.secagg.masks import add_mask

# 255 degrees of freedom: mean 255, standard deviation 22.6; exceeded once in about 10^10 draws
CHI_SQUARE = 420.0


def stream(seed, size):
    """pycryptodome's ChaCha20 of RFC 8439, counter from 0."""
    return ChaCha20.new(key=seed, nonce=bytes(12)).encrypt(bytes(size))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("length", [1, 7, 2**13, 2**14, 2**14 + 1, 50_001])
def test_a_mask_is_the_keystream_of_a_second_library(bits, length):
    seed = hashlib.sha256(b"seed").digest()
    expected = np.frombuffer(stream(seed, length * bits // 8), f"<u{bits // 8}")
    total = np.zeros(length, expected.dtype)
    add_mask(total, seed)
    np.testing.assert_array_equal(total, expected)
    total[:] = 5
    add_mask(total, seed, minus=True)
    np.testing.assert_array_equal(total, 5 - expected)
    add_mask(total, seed)
    assert (total == 5).all()


def test_the_keystream_of_rfc_8439():
    """Appendix A.1, test vector 1: key, nonce and counter 0."""
    total = np.zeros(16, np.uint32)
    add_mask(total, bytes(32))
    assert total.tobytes().hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )


def test_agreement_is_that_of_rfc_7748():
    """Section 6.1."""
    alice = pair_from(bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
    bob = pair_from(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert alice.public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert bob.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert agree(alice, bob.public) == agree(bob, alice.public)
    assert (
        agree(alice, bob.public).hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )


def test_derivation_is_that_of_rfc_5869():
    """Appendix A.3 for the bytes; with a label, the definition by HMAC."""
    assert (
        derive(b"\x0b" * 22, b"").hex() == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    )
    key = hmac.digest(bytes(32), b"secret", "sha256")
    assert derive(b"secret", b"label") == hmac.digest(key, b"label\x01", "sha256")


def test_sealing_is_that_of_a_second_library():
    cipher = ChaCha20_Poly1305.new(key=derive(b"secret", b"label"), nonce=bytes(12))
    cipher.update(b"label")
    assert seal(b"secret", b"label", b"two shares") == b"".join(cipher.encrypt_and_digest(b"two shares"))


def test_two_clients_have_one_mask_and_no_two_names_the_same():
    one, other, t = new_pair(), new_pair(), terms()
    assert pair_mask(one, 1, other.public, 2, t) == pair_mask(other, 2, one.public, 1, t)
    assert pair_from(secret_of(one)).public == one.public
    seeds = {
        pair_mask(one, 1, other.public, 2, t),
        pair_mask(one, 2, other.public, 1, t),
        pair_mask(one, 1, other.public, 2, terms(round=4)),
        pair_mask(one, 1, other.public, 2, terms(session=bytes(16))),
        own_mask(bytes(32), t, 1),
        own_check(bytes(32), t, 1),
        own_mask(bytes(32), t, 2),
        own_mask(bytes(32), terms(round=4), 1),
    }
    assert len(seeds) == 8


def chi_square(data):
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    return float(np.sum((counts - len(data) / 256) ** 2) / (len(data) / 256))


def test_masked_vectors_look_uniform_and_differ_between_rounds():
    seen = []
    for number in (1, 2):
        cohort = Cohort(3, terms=terms(20_000, 32, number))
        cohort.vectors = {n: np.full(20_000, 7, np.uint32) for n in cohort.names}
        questions = cohort.until("masked")
        for name in cohort.names:
            answer = cohort.answer("masked", name, questions[name])
            seen.append(messages.read_masked(answer, cohort.terms, cohort.server._stage.circle.index[name]))
    for i, one in enumerate(seen):
        assert chi_square(one.tobytes()) < CHI_SQUARE
        for other in seen[:i]:
            assert chi_square((one - other).tobytes()) < CHI_SQUARE
    assert chi_square(np.full(20_000, 7, np.uint32).tobytes()) > CHI_SQUARE


def test_one_client_that_tells_the_coordinator_all_it_knows_uncovers_no_other():
    """It knows its masks with the others; what is left of theirs is still under their own mask
    and those with the honest.
    """
    cohort = Cohort(4, terms=terms(20_000, 32))
    cohort.vectors = {n: np.zeros(20_000, np.uint32) for n in cohort.names}
    questions = cohort.until("masked")
    traitor = cohort.rounds["device-0"]._state
    circle = cohort.server._stage.circle
    for name in cohort.names[1:]:
        index = circle.index[name]
        seen = messages.read_masked(
            cohort.answer("masked", name, questions[name]), cohort.terms, index
        ).copy()
        before = chi_square(seen.tobytes())
        seed = pair_mask(
            traitor.pairs.masking, traitor.place.index, circle.keys[index].masking, index, cohort.terms
        )
        add_mask(seen, seed, minus=index < traitor.place.index)
        assert before < CHI_SQUARE and chi_square(seen.tobytes()) < CHI_SQUARE


def test_the_sum_is_still_hidden_before_the_last_answers():
    cohort = Cohort(4, terms=terms(20_000, 32))
    cohort.vectors = {n: np.zeros(20_000, np.uint32) for n in cohort.names}
    cohort.until("unmask")
    assert chi_square(cohort.server._stage.masked.total.tobytes()) < CHI_SQUARE
