"""What a stateful method is given and gives back. Values are Arrays of float32; nothing given is changed."""

from dataclasses import dataclass
from typing import Protocol

from fedtune.types import Arrays, Metrics


@dataclass(frozen=True)
class Pull:
    """What is added to the gradient g of each local step at w: strength (w - towards) + offset.

    `towards`: None is where the training begins. `ascent`: g is taken at w + ascent g'/|g'|, with g' the gradient at w; 0: at w.
    """

    strength: float = 0.0
    towards: Arrays | None = None
    offset: Arrays | None = None
    ascent: float = 0.0


class Local(Protocol):
    """Trains from `start` for a round on the client's own data. `purpose` names the draws of batches."""

    def __call__(self, start: Arrays, pull: Pull, purpose: str = "local") -> tuple[Arrays, Metrics]: ...


@dataclass(frozen=True)
class Client:
    """One client in one round.

    Attributes:
        model: the trained tensors at the round's start, with what else travelled beside them.
        kept: what it kept of the last round it took part in; None in its first.
        steps: optimizer steps that a training makes. rates: learning rate of each trained tensor in this round.
    """

    model: Arrays
    kept: Arrays | None
    local: Local
    steps: int
    rates: dict[str, float]


@dataclass(frozen=True)
class Answer:
    """`update`: what is sent, with the metrics. `kept`: what stays here for the next time."""

    update: Arrays
    metrics: Metrics
    kept: Arrays
