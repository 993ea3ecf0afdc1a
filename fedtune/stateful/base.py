"""What a stateful method is given and gives back. Values are Arrays of float32; nothing given is changed.

A method is two pure functions: asks(client, …) -> the trainings it wants, and answer(client, what they gave,
…) -> Answer. So an engine may train one client after another, or many together.
"""

from dataclasses import dataclass, field

import numpy as np

from fedtune.types import Arrays, Metrics


@dataclass(frozen=True)
class Pull:
    """What is added to the gradient g of each local step at w: strength (w - towards) + offset.

    `towards`: None is where the training begins. `ascent`: g is taken at w + ascent g'/|g'|, with g' the
    gradient at w; 0: at w. `moving`: 1 for the entries that the steps move, 0 for those that stay where the
    training begins, whatever the optimizer; None: all move.
    """

    strength: float = 0.0
    towards: Arrays | None = None
    offset: Arrays | None = None
    ascent: float = 0.0
    moving: Arrays | None = None


@dataclass(frozen=True)
class Ask:
    """A training that a method asks for: from `start`, for a round, on the client's own data.

    `purpose` names the draw of its batches.

    `start`: what is not in it is as the training before it left it, which then has to be over.
    """

    start: Arrays
    pull: Pull
    purpose: str = "local"


Trained = tuple[Arrays, Metrics]
"""What a training made of its start, and loss and accuracy as seen on the way."""


@dataclass(frozen=True)
class Client:
    """One client in one round.

    Attributes:
        model: the trained tensors at the round's start, with what else travelled beside them.
        kept: what it kept of the last round it took part in; None in its first.
        steps: optimizer steps that a training makes. rates: learning rate of each
            trained tensor in this round.
        labels: of its examples, int64 [n].
    """

    model: Arrays
    kept: Arrays | None
    steps: int
    rates: dict[str, float]
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class Answer:
    """`update`: what is sent, with the metrics. `kept`: what stays here for the next time."""

    update: Arrays
    metrics: Metrics
    kept: Arrays
