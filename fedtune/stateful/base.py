"""What a stateful method is given and gives back. Values are Arrays of float32; nothing given is changed.

A method is two pure functions: trainings(client, …) -> what it wants trained, and answer(client, what that
gave, …) -> Answer. So an engine may train one client after another, or many together. The file of a method
ends with its Method, which says the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedtune.job import Job
from fedtune.types import Arrays, Metrics
from fedtune.wire import Schema


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
class Training:
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
            trained tensor in this round. labels: of its examples, int64 [n]. These are
            there for a method that keeps something.
    """

    model: Arrays
    kept: Arrays | None
    steps: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class Answer:
    """`update`: what is sent, with the metrics. `kept`: what stays here for the next time."""

    update: Arrays
    metrics: Metrics
    kept: Arrays


def same(values: Schema) -> Schema:
    """The schema itself."""
    return values


def as_it_is(model: Arrays) -> Arrays:
    """The model itself."""
    return model


@dataclass(frozen=True)
class Method:
    """What a job's clients do in a round, and what of it stays with them.

    Attributes:
        name: as a job has it.
        trainings: (job, client) -> the trainings of a client's round.
        answer: (job, schema of the trained tensors, client, what they gave) -> what the client
            makes of them.
        keeps: of the trained tensors' schema, what a client keeps from round to round; None: nothing.
        personal: (global model, what a client keeps) -> the trained tensors with which it predicts;
            None where it predicts with nothing of its own.
        travelling: of the trained tensors' schema, what models and updates hold.
        shared: the model with which everybody predicts, from the one that is trained on; both as
            they travel.
        gradients: that a client computes for each example it trains on.
        copies: arrays as large as all trained tensors that a client holds in a step beside those of
            a plain one.
        calming: the key, beside federation.lr, that calms a training which diverges; "" for none.
    """

    name: str
    trainings: Callable[[Job, Client], tuple[Training, ...]]
    answer: Callable[[Job, Schema, Client, Sequence[Trained]], Answer]
    keeps: Callable[[Schema], Schema] | None = None
    personal: Callable[[Arrays, Arrays], Arrays] | None = None
    travelling: Callable[[Schema], Schema] = same
    shared: Callable[[Arrays], Arrays] = as_it_is
    gradients: int = 1
    copies: int = 0
    calming: str = ""
