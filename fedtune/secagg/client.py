"""The client's side of a round: four questions, four answers, each once and in order."""

import secrets
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from fedtune.errors import Refused
from fedtune.secagg import messages
from fedtune.secagg.keys import (
    Pair,
    agree,
    new_pair,
    own_check,
    own_mask,
    pair_mask,
    seal,
    secret_of,
    share_label,
    unseal,
)
from fedtune.secagg.masks import add_mask, require_vector
from fedtune.secagg.messages import Keys, Place
from fedtune.secagg.shamir import SECRET, SHARE, split, value
from fedtune.secagg.terms import Terms


@dataclass(frozen=True)
class _Fresh:
    """Nothing said yet."""


@dataclass(frozen=True)
class _Keyed:
    """Public keys are out."""

    sealing: Pair
    masking: Pair


@dataclass(frozen=True)
class _Shared:
    """Sealed shares are out. `mine`: this client's own share of its own seed."""

    pairs: _Keyed
    place: Place
    seed: bytes = field(repr=False)
    mine: bytes = field(repr=False)


@dataclass(frozen=True)
class _Masked:
    """The masked vector is out; the keys and the seed are gone.

    `seeds`, `mask_keys`: the shares held, by whose secret they are of.
    """

    index: int
    threshold: int
    seeds: dict[int, bytes] = field(repr=False)
    mask_keys: dict[int, bytes] = field(repr=False)


_State = _Fresh | _Keyed | _Shared | _Masked
_S = TypeVar("_S", _Fresh, _Keyed, _Shared, _Masked)


class ClientRound:
    """One client in one round.

    Make it once a round: whoever answers two rounds with the same vector tells its
    difference to others' sums.

    Each method reads the coordinator's question and returns the answer, as bytes. Whatever goes wrong
    ends the round for this client: what it knew is dropped, and every later call is refused. So no
    question is answered twice.
    """

    def __init__(self, terms: Terms, *, minimum: int) -> None:
        """minimum: this client's floor, at least 2: so many holders must answer before a secret opens, so no
        sum is of fewer clients.

        Raises ValueError for a lower one: a sum of one client is that client's vector.
        """
        if minimum < 2:
            raise ValueError(
                f"minimum {minimum}: must be at least 2, or the sum could be one client's vector"
            )
        self.terms, self.minimum = terms, minimum
        self._state: _State | None = _Fresh()

    def keys(self, question: bytes) -> bytes:
        """Stage 0: two fresh public keys.

        Raises Refused for a message that is not this round's first question.
        """
        self._leave(_Fresh)
        messages.read_ask_keys(question, self.terms)
        pairs = _Keyed(new_pair(), new_pair())
        self._state = pairs
        return messages.keys(self.terms, Keys(pairs.sealing.public, pairs.masking.public))

    def shares(self, question: bytes) -> bytes:
        """Stage 1: shares of a fresh seed and of the mask key, each sealed for one neighbour.

        Raises Refused when the neighbours are too few for `minimum`, the threshold is not more than half of
        the holders, or keys repeat or are unusable.
        """
        pairs = self._leave(_Keyed)
        place = messages.read_place(question, self.terms)
        _check_place(place, pairs, self.minimum)
        seed = secrets.token_bytes(SECRET)
        points = [i + 1 for i in (place.index, *place.keys)]
        seeds = split(seed, place.threshold, points)
        # its own goes nowhere: it is for when this client is gone
        mask_keys = split(secret_of(pairs.masking), place.threshold, points)
        sealed = {}
        for i, keys in place.keys.items():
            label = share_label(self.terms, place.index, pairs.sealing.public, i, keys.sealing)
            sealed[i] = seal(agree(pairs.sealing, keys.sealing), label, seeds[i + 1] + mask_keys[i + 1])
        self._state = _Shared(pairs, place, seed, seeds[place.index + 1])
        return messages.shares(self.terms, place.index, own_check(seed, self.terms, place.index), sealed)

    def masked(self, question: bytes, vector: np.ndarray) -> bytes:
        """Stage 2: the vector under its masks.

        vector: [length], unsigned, of the round's bits; ValueError for anything else. It is not changed.

        Raises Refused when too few neighbours shared, one is unknown, or a share does not open.
        """
        require_vector(vector, self.terms)
        state = self._leave(_Shared)
        place, pairs = state.place, state.pairs
        boxes = messages.read_inbox(question, self.terms)
        _require(boxes.keys() <= place.keys.keys(), "client", "shares from one who is no neighbour")
        _require(
            len(boxes) + 1 >= place.threshold,
            "threshold",
            f"{len(boxes) + 1} holders are left, {place.threshold} are needed",
        )
        seeds, mask_keys, total = {place.index: state.mine}, {}, vector.copy()
        for i, box in boxes.items():
            keys = place.keys[i]
            label = share_label(self.terms, i, keys.sealing, place.index, pairs.sealing.public)
            seeds[i], mask_keys[i] = _two_shares(unseal(agree(pairs.sealing, keys.sealing), label, box))
            # Of each two neighbours one adds and the other takes away, so that the sum has neither.
            add_mask(
                total,
                pair_mask(pairs.masking, place.index, keys.masking, i, self.terms),
                minus=i < place.index,
            )
        add_mask(total, own_mask(state.seed, self.terms, place.index))
        self._state = _Masked(place.index, place.threshold, seeds, mask_keys)
        return messages.masked(self.terms, place.index, total)

    def unmask(self, question: bytes) -> bytes:
        """Stage 3, the last: of each holder of this client's circle one share, of the seed if it sent a
        vector, else of its mask key.

        Raises Refused unless the two lists together are exactly the circle that shared, without one in both,
        this client is among the survivors, and these reach the threshold.
        """
        state = self._leave(_Masked)
        there, gone = messages.read_survivors(question, self.terms)
        _require(
            there.isdisjoint(gone),
            "survivors",
            "one is in both lists; a client gives one kind of share for each",
        )
        _require(
            there | gone == state.seeds.keys(),
            "survivors",
            "the lists are not those whose shares this client holds",
        )
        _require(
            state.index in there, "survivors", "this client sent a vector and is not among the survivors"
        )
        _require(
            len(there) >= state.threshold,
            "threshold",
            f"{len(there)} survivors, {state.threshold} are needed",
        )
        return messages.opened(
            self.terms, state.index, {i: state.seeds[i] for i in there}, {i: state.mask_keys[i] for i in gone}
        )

    def _leave(self, kind: type[_S]) -> _S:
        """The state, if it is the one this question belongs to.

        It is left before anything is read, so that no error leaves it behind.
        """
        state, self._state = self._state, None
        if not isinstance(state, kind):
            raise Refused(
                "order",
                "the round is over for this client"
                if state is None
                else "not the question that comes next; the round is over",
            )
        return state


def _check_place(place: Place, mine: _Keyed, minimum: int) -> None:
    holders = len(place.keys) + 1
    _require(place.index not in place.keys, "neighbours", "this client is named as its own neighbour")
    _require(
        place.threshold >= minimum,
        "threshold",
        f"{place.threshold} clients open a secret, this client's minimum is {minimum}",
    )
    _require(
        place.threshold <= holders < 2 * place.threshold,
        "threshold",
        f"{place.threshold} of {holders} holders: must be more than half, and no more than there are",
    )
    keys = [
        mine.sealing.public,
        mine.masking.public,
        *(k for pair in place.keys.values() for k in (pair.sealing, pair.masking)),
    ]
    _require(len(set(keys)) == len(keys), "key", "two clients have the same public key")


def _two_shares(plain: bytes) -> tuple[bytes, bytes]:
    """(share of the seed, share of the mask key). Raises Refused("share")."""
    seed, mask_key = plain[:SHARE], plain[SHARE:]
    for share in (seed, mask_key):
        value(share)
    return seed, mask_key


def _require(condition: bool, reason: str, message: str) -> None:
    if not condition:
        raise Refused(reason, message)
