"""The client of federated averaging (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1), with the pull of
FedProx (Li et al. 2020, arXiv:1812.06127) where the job has one: one training from the model that came, and
nothing is kept.
"""

from collections.abc import Sequence

from fedtune.stateful.base import Answer, Client, Method, Pull, Trained, Training


def trainings(client: Client, proximal: float = 0.0) -> tuple[Training, ...]:
    """proximal: mu of FedProx."""
    return (Training(client.model, Pull(proximal)),)


def answer(trained: Sequence[Trained]) -> Answer:
    ((update, metrics),) = trained
    return Answer(update, metrics, {})


PLAIN = Method(
    "none",
    lambda job, client: trainings(client, job.federation.proximal),
    lambda job, schema, client, trained: answer(trained),
)
