"""FedPer (Arivazhagan et al. 2019, arXiv:1912.00818, Algorithms 1 and 2): the head is trained with the rest
and stays on the client; the rest is averaged.

    client k: (w, h_k) <- steps from (w^t, h_k), sends w            server: w^{t+1} = sum p_k w_k

h_k begins at the initial head, with which a client that was never asked predicts, too.
"""

from collections.abc import Sequence

from fedtune.stateful.base import Answer, Client, Method, Pull, Trained, Training
from fedtune.types import Arrays
from fedtune.wire import Schema

HEAD = "head"
"""The unit that stays."""


def shared(schema: Schema) -> Schema:
    """What travels."""
    return Schema(tuple(t for t in schema.tensors if t.unit != HEAD))


def own(schema: Schema) -> Schema:
    """What stays."""
    return Schema(schema.of_units([HEAD]))


def trainings(client: Client, proximal: float = 0.0) -> tuple[Training, ...]:
    """client.model has the initial head."""
    return (Training(client.model | (client.kept or {}), Pull(proximal)),)


def answer(trained: Sequence[Trained], schema: Schema) -> Answer:
    """schema: of all trained tensors."""
    ((values, metrics),) = trained
    return Answer(
        {t.name: values[t.name] for t in shared(schema).tensors},
        metrics,
        {t.name: values[t.name] for t in own(schema).tensors},
    )


def personal(model: Arrays, kept: Arrays) -> Arrays:
    """What the client predicts with."""
    return model | kept


FED_PER = Method(
    "head",
    lambda job, client: trainings(client, job.federation.proximal),
    lambda job, schema, client, trained: answer(trained, schema),
    keeps=own,
    personal=personal,
    travelling=shared,
)
