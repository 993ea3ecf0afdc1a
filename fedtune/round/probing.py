"""The coordinator's side of a probe: who was asked which blocks matter, and what the answers say."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedtune.algorithms.probes import SCORES
from fedtune.errors import Refused
from fedtune.wire import Schema, decode

NOT_ASKED = "not asked, as it cannot go down to the first block"


@dataclass(frozen=True)
class Probe:
    """The probe that a round began with; of nobody where it began without.

    Attributes:
        asked: the clients drawn for it.
        silent: of them those without an answer that counts, and why.
    """

    asked: tuple[str, ...] = ()
    silent: Mapping[str, str] = field(default_factory=dict)


def scores_in(payload: bytes, expected: Schema, round: int, frame: str) -> np.ndarray:
    """The scores [blocks] of an answer. expected: as `answers`. Raises Refused for one that says nothing."""
    scores = decode(payload, expected, kinds=["block-scores"], round=round, frame=frame).arrays[SCORES]
    if not scores.any():
        raise Refused("scores", "all are 0, as of a client with too few examples")
    if not (scores >= 0).all():
        raise Refused("scores", "a negative one")
    return scores
