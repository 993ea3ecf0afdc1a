"""Ditto (Li et al. 2021, arXiv:2012.04221, Algorithm 1): beside the global model w, each client k trains a
model v of its own that is pulled towards w.

    w by federated averaging, as without          v <- v - lr (grad F_k(v) + lambda (v - w^t))

v takes as many steps as w and with the same optimizer, on batches of its own draw. It never leaves the
client, so nothing more is sent, and the global model is that of a run without. The paper leaves the start of
v open: here it is the model of the first round that the client takes part in.
"""

from collections.abc import Sequence

from fedtune.stateful.base import Answer, Client, Method, Pull, Trained, Training, same
from fedtune.types import Arrays


def trainings(client: Client, strength: float, proximal: float = 0.0) -> tuple[Training, ...]:
    """Trainings of w and v. strength: lambda. proximal: mu of FedProx, for w alone."""
    return Training(client.model, Pull(proximal)), Training(
        client.kept or client.model, Pull(strength, client.model), "personal"
    )


def answer(trained: Sequence[Trained]) -> Answer:
    (update, metrics), (own, _) = trained
    return Answer(update, metrics, own)


def personal(model: Arrays, kept: Arrays) -> Arrays:
    """What the client predicts with."""
    return kept


DITTO = Method(
    "ditto",
    lambda job, client: trainings(client, job.personal.strength, job.federation.proximal),
    lambda job, schema, client, trained: answer(trained),
    keeps=same,
    personal=personal,
    gradients=2,
    copies=2,
    calming="personal.strength",
)
