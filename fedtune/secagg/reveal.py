"""The last step at the coordinator: from the shares that came back to the secrets,
and from the masked sum to the sum.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedtune.errors import Refused, SecAggFailed
from fedtune.secagg.keys import own_check, own_mask, pair_from, pair_mask
from fedtune.secagg.masks import add_mask
from fedtune.secagg.messages import Keys
from fedtune.secagg.shamir import combine, weights_at_zero
from fedtune.secagg.terms import Terms


@dataclass(frozen=True)
class Circle:
    """Who stands where: names, public keys and neighbours by index; and how many holders open a secret."""

    terms: Terms
    threshold: int
    names: tuple[str, ...]
    keys: tuple[Keys, ...]
    neighbours: tuple[tuple[int, ...], ...]

    @cached_property
    def index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}


@dataclass(frozen=True)
class Masked:
    """total: [length], the sum of the masked vectors. there: who sent one. checks: of everyone who shared
    a seed, what to know it by.
    """

    total: np.ndarray
    there: frozenset[int]
    checks: Mapping[int, bytes]


Opened = Mapping[int, tuple[Mapping[int, bytes], Mapping[int, bytes]]]
"""By who answered: (shares of seeds, shares of mask keys), by whose they are."""


def short(circle: Circle, whose: Iterable[int], there: frozenset[int]) -> tuple[str, int] | None:
    """A client with fewer holders there than the threshold, and how many it has; None if all have enough."""
    for i in whose:
        count = (i in there) + sum(j in there for j in circle.neighbours[i])
        if count < circle.threshold:
            return circle.names[i], count
    return None


def reveal(circle: Circle, masked: Masked, opened: Opened) -> np.ndarray:
    """The sum of the vectors, [length]: the masked total without the survivors' own masks and their masks
    with those who are gone.

    Every secret is checked against what its owner sent before it was needed: a seed by its check,
    a mask key by the public key.

    Raises SecAggFailed, naming the client whose secret does not come out right. Fails closed: no other choice
    of shares is tried. Source: Bonawitz et al. 2017, Fig. 4, round 4.
    """
    total, weights = masked.total.copy(), _Weights()
    for i in masked.checks:
        holders = [j for j in sorted((i, *circle.neighbours[i])) if j in opened][: circle.threshold]
        which = 0 if i in masked.there else 1
        try:
            secret = combine(
                [(j + 1, opened[j][which][i]) for j in holders], circle.threshold, weights.of(holders)
            )
        except Refused as e:
            raise _wrong(circle, i, str(e)) from None
        if which == 0:
            if own_check(secret, circle.terms, i) != masked.checks[i]:
                raise _wrong(circle, i, "the seed is not the one it promised")
            add_mask(total, own_mask(secret, circle.terms, i), minus=True)
        else:
            _take_back(total, circle, masked.there, i, secret)
    return total


def _take_back(total: np.ndarray, circle: Circle, there: frozenset[int], gone: int, secret: bytes) -> None:
    """Takes from `total` what the survivors' masks with one who is gone put into it, in place."""
    pair = pair_from(secret)
    if pair.public != circle.keys[gone].masking:
        raise _wrong(circle, gone, "the mask key is not that of its public key")
    for j in circle.neighbours[gone]:
        if j in there:
            add_mask(total, pair_mask(pair, gone, circle.keys[j].masking, j, circle.terms), minus=gone > j)


class _Weights(dict[tuple[int, ...], dict[int, int]]):
    """Lagrange's weights by holders: in a complete graph the same for all secrets."""

    def of(self, holders: list[int]) -> dict[int, int]:
        key = tuple(holders)
        if key not in self:
            self[key] = weights_at_zero([j + 1 for j in holders])
        return self[key]


def _wrong(circle: Circle, index: int, why: str) -> SecAggFailed:
    return SecAggFailed(
        f"shares of client {circle.names[index]!r} do not open its secret: {why}; "
        "the round is void and nothing is released"
    )
