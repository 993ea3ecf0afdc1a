"""Local training with forward passes alone; see `fedtune.bundles.subspace`.

No torch: `passes` is whatever runs the model.
"""

from collections.abc import Callable

import numpy as np

from fedtune.bundles.subspace import Subspace, order
from fedtune.common.seeds import generator
from fedtune.data.clients import Stream
from fedtune.data.encoded import ClientData
from fedtune.job import Job
from fedtune.round.batches import local_batches
from fedtune.round.rates import learning_rate
from fedtune.types import Arrays, Metrics
from fedtune.wire import Pieces

Passes = Callable[[Arrays, ClientData], np.ndarray]
"""(trained tensors, examples) -> float64 [3]: summed loss, right predictions, predictions."""


def train_forward(
    space: Subspace,
    numbers: np.ndarray,
    data: ClientData | Stream,
    job: Job,
    round: int,
    client: str,
    passes: Passes,
) -> Metrics:
    """Moves `numbers`, float32 [K], in place, by a round's steps: for each batch,
    with the mean loss L and the next direction z_j,

        slope = (L(theta + eps z_j) - L(theta - eps z_j)) / (2 eps)        a_j -= lr * slope

    The batches are those of training with gradients. The metrics are of theta + eps z_j.
    """
    fed, eps, lr = job.federation, np.float32(job.edge.perturbation), learning_rate(job.federation, "", round)
    theta, totals = space.expand(numbers).vector, np.zeros(3)
    steps = order(space, generator(fed.seed, "directions", round, client))
    for index in local_batches(
        data.lengths,
        fed.batch_size,
        fed.local_epochs,
        fed.local_steps,
        generator(fed.seed, "local", round, client),
    ):
        taken, j = data.take(index), next(steps)
        z = space.direction(j)
        above, below = (passes(Pieces(theta + side * z, space.schema.layout), taken) for side in (eps, -eps))
        if not above[2]:  # a batch of one-token texts predicts nothing
            continue
        moved = np.float32(lr * (above[0] - below[0]) / above[2] / (2.0 * float(eps)))
        numbers[j] -= moved
        theta -= moved * z
        totals += above
    return {"loss": (totals[0], totals[2]), "accuracy": (totals[1], totals[2])}
