"""Which examples form which batch: pure functions over lengths and a generator."""

from collections.abc import Iterator, Sequence

import numpy as np

from fedtune.common.seeds import generator
from fedtune.data.clients import Stream
from fedtune.data.encoded import ClientData
from fedtune.job import FederationSection, Job, UnitsSection
from fedtune.tasks import base, task_named

POOL = 8


def epoch_batches(lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """One epoch of index arrays: each example once, batches of about equal length, in random order.

    Examples are shuffled, then sorted by length within pools of POOL batches, so that short texts are not
    padded to the longest of the epoch, while batches stay random. The last batch of a pool may be smaller.
    """
    order = rng.permutation(len(lengths))
    size = np.asarray(lengths)
    batches: list[np.ndarray] = []
    for start in range(0, len(order), POOL * batch_size):
        pool = order[start : start + POOL * batch_size]
        pool = pool[np.argsort(size[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def local_batches(
    lengths: Sequence[int], batch_size: int, epochs: int, steps: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """The batches of one client's round: `epochs` epochs, cut after `steps` batches when steps > 0."""
    count = 0
    for _ in range(epochs):
        for batch in epoch_batches(lengths, batch_size, rng):
            if steps and count == steps:
                return
            count += 1
            yield batch


def by_length(lengths: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Every example once, longest first, for evaluation: the order of the answer is
    the caller's to restore.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def probed_batches(
    lengths: Sequence[int], units: UnitsSection, settings: FederationSection, round: int, client: str
) -> Iterator[np.ndarray]:
    """The batches of a client's probe: some of a local epoch's, other ones in each round.

    Of one example each where the score wants it.
    """
    score = units.chosen.score
    rng = generator(settings.seed, "probe", round, client)
    for batch in local_batches(lengths, settings.batch_size, 1, units.probe_batches, rng):
        yield from np.split(batch, len(batch)) if score and score.single else (batch,)


def trainable_batches(
    data: ClientData | Stream, batches: Sequence[np.ndarray], kind: base.Task
) -> list[np.ndarray]:
    """Without those that predict nothing (one-token texts): they make no step."""
    if kind.has_head:
        return list(batches)
    lengths = np.array(data.lengths)
    return [index for index in batches if kind.predictions(lengths[index]).sum() > 0]


def training_batches(
    job: Job, client: str, data: ClientData | Stream, round: int, purpose: str = "local"
) -> list[np.ndarray]:
    """The examples of each optimizer step of a client's training, from the draw that `purpose` names."""
    fed = job.federation
    drawn = local_batches(
        data.lengths,
        fed.batch_size,
        fed.local_epochs,
        fed.local_steps,
        generator(fed.seed, purpose, round, client),
    )
    return trainable_batches(data, list(drawn), task_named(job.model.task))
