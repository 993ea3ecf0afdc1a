"""SCAFFOLD (Karimireddy et al. 2020, arXiv:1910.06378, Algorithm 1, option II): each step is corrected by how
far the client's gradients lie from everybody's.

    client i: y from w^t by K steps  y <- y - lr (g(y) - c_i + c);   c_i+ = c_i - c + (w^t - y) / (K lr);
              sends y and c + (c_i+ - c_i)
    server:   w^{t+1} = mean of the y (a global learning rate of 1);   c <- c + (1 / N) sum of (c_i+ - c_i)

The control c travels beside the model, a tensor for each trained one, so that messages are twice as long; c_i
stays on its client. Both begin at 0. K lr is what a step of plain SGD moves by, which is why no other
optimizer is allowed. A client whose update is refused or lost on its way has moved its c_i all the same, and
c lacks that change for the rest of the run; of a void round, the controls that came count.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.stateful.base import Answer, Client, Method, Pull, Trained, Training, same
from fedtune.types import Arrays, RoundReport, TensorSpec, Update
from fedtune.wire import Schema

if TYPE_CHECKING:
    from fedtune.algorithms.base import Algorithm, State

CONTROL = "control."
"""Begins the name of the control of a tensor."""


def with_controls(schema: Schema) -> Schema:
    """What travels: the trained tensors, then their controls."""
    return Schema((*schema.tensors, *(TensorSpec(CONTROL + t.name, t.shape, t.unit) for t in schema.tensors)))


def trainings(client: Client) -> tuple[Training, ...]:
    """client.model holds tensors and controls."""
    model, common, own = _parts(client)
    return (Training(model, Pull(offset={name: common[name] - own[name] for name in model})),)


def answer(client: Client, given: Sequence[Trained]) -> Answer:
    model, common, own = _parts(client)
    ((trained, metrics),) = given
    if not client.steps:  # nothing to train on: nothing is known of its gradients
        return Answer(trained | {CONTROL + name: common[name] for name in model}, metrics, own)
    moved = {
        name: (model[name].astype("f8") - trained[name]) / (client.steps * client.rates[name])
        for name in model
    }
    change = {name: (moved[name] - common[name]).astype("f4") for name in model}
    return Answer(
        trained | {CONTROL + name: common[name] + change[name] for name in model},
        metrics,
        {name: own[name] + change[name] for name in model},
    )


def _parts(client: Client) -> tuple[Arrays, Arrays, Arrays]:
    """(model, c, c_i), by the names of the trained tensors."""
    model = {name: a for name, a in client.model.items() if not name.startswith(CONTROL)}
    return (
        model,
        {name: client.model[CONTROL + name] for name in model},
        client.kept or {name: a * 0 for name, a in model.items()},
    )


def steering(inner: "Algorithm", clients: int) -> "Algorithm":
    """`inner`, an average of updates that all count alike, with the server's part. clients: N,
    those that could ever be asked.
    """

    def step(state: "State", updates: Iterable[Update]) -> "tuple[State, RoundReport]":
        after, report = inner.step(state, updates)
        return replace(
            after, arrays=part_of(state.arrays, after.arrays, min(1.0, len(report.clients) / clients))
        ), report

    return replace(inner, step=step)


def controls_of(arrays: Arrays) -> Arrays:
    """Of a model, the controls; empty where none travel."""
    return {name: a for name, a in arrays.items() if name.startswith(CONTROL)}


def part_of(before: Arrays, mean: Arrays, share: float) -> Arrays:
    """The mean, of whose controls only this share of their change counts: the others' are as they were."""
    return {
        name: (before[name] + share * (a.astype("f8") - before[name])).astype(a.dtype)
        if name.startswith(CONTROL)
        else a
        for name, a in mean.items()
    }


SCAFFOLD = Method(
    "scaffold",
    lambda job, client: trainings(client),
    lambda job, schema, client, trained: answer(client, trained),
    keeps=same,
    travelling=with_controls,
    copies=3,
)
