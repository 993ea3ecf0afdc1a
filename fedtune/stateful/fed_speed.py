"""FedSpeed (Sun et al. 2023, arXiv:2302.10429, Algorithm 1): a pull to the round's start, corrected by what
it took away in earlier rounds, and gradients taken uphill.

    step:     g' = g(w + rho g(w)/|g(w)|);   w <- w - lr (g' + mu (w - w^t + h_i))
    then:     h_i <- h_i + (w - w^t);   sends w + h_i
    server:   w^{t+1} = mean of what came

mu is the paper's 1/lambda and h_i its -lambda g_i, the prox-correction. The paper mixes the gradients at both
places by alpha; this is alpha = 1, and the uphill step has length rho, both as in the authors' code
(FL-Simulator). That code sends w alone and adds the mean of h over all clients, asked or not; here clients
send w + h_i, and the server is that of federated averaging. A step costs two gradients, and messages are as
long as ever. A client whose update is lost has moved its h_i all the same.
"""

from collections.abc import Sequence

from fedtune.stateful.base import Answer, Client, Method, Pull, Trained, Training, same
from fedtune.types import Arrays


def trainings(client: Client, strength: float, ascent: float) -> tuple[Training, ...]:
    """strength: mu. ascent: rho."""
    kept = _kept(client)
    return (
        Training(
            client.model,
            Pull(strength, {name: a - kept[name] for name, a in client.model.items()}, ascent=ascent),
        ),
    )


def answer(client: Client, given: Sequence[Trained]) -> Answer:
    kept, ((trained, metrics),) = _kept(client), given
    after = {name: kept[name] + (trained[name] - a) for name, a in client.model.items()}
    return Answer({name: trained[name] + after[name] for name in trained}, metrics, after)


def _kept(client: Client) -> Arrays:
    """h_i, 0 before the first round."""
    return client.kept or {name: a * 0 for name, a in client.model.items()}


FED_SPEED = Method(
    "fedspeed",
    lambda job, client: trainings(client, job.federation.proximal, job.federation.ascent),
    lambda job, schema, client, trained: answer(client, trained),
    keeps=same,
    gradients=2,
    copies=4,
    calming="federation.proximal",
)
