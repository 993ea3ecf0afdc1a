"""The vectorised engine: answers a round's packets by training the whole cohort together,
in blocks that fit in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from torch import Tensor

from fedtune.adapters.methods import write
from fedtune.data.encoded import ClientData
from fedtune.errors import Refused
from fedtune.job import Job, SimulationSection
from fedtune.privacy.example import ExamplePrivacy, noisy_metrics, poisson_batches
from fedtune.round.asked import asked
from fedtune.round.batches import training_batches
from fedtune.round.client import ClientTraining, in_process, updates
from fedtune.round.replies import Reply
from fedtune.stateful.base import Pull, Trained
from fedtune.stateful.methods import method_of
from fedtune.training.chunks import Task
from fedtune.training.cohort import CohortTrainer, Pulls
from fedtune.training.local import only
from fedtune.training.worker import Worker
from fedtune.types import Arrays, Metrics
from fedtune.wire import Pieces, Schema, decode, kind_of

MOST_TOGETHER = 256
"""Clients in a block unless the job says otherwise: beyond it nothing is gained, and replies come seldom."""
MOST_TRAINERS = 8
"""Sets of tensors whose trainers are kept for the next clients that train the same."""
COPIES = 8
"""Arrays as large as a model that each client of a block needs: values, gradient, two moments, a chunk's
copies, and what is sent.
"""
KEPT = 4
"""Times that memory for a client that keeps something: its trainings, their starts and what pulls them."""


@dataclass(frozen=True)
class Stacked:
    """The learner that trains clients together: those that train the tensors of `trainer`."""

    worker: Worker
    trainer: CohortTrainer

    def train_each(self, trainings: Sequence[ClientTraining]) -> Iterator[Trained]:
        """All at once; see `fedtune.round.client.Train`."""
        first, job, schema = trainings[0], self.worker.job, self.trainer.schema
        tasks = [_task(job, one) for one in trainings]
        alike = all(one.start is first.start and one.pull is first.pull for one in trainings)
        if first.privacy is not None or (alike and _only_proximal(first.pull, job)):
            starts, pulls = _flat(first.start, schema), None
        else:
            starts, pulls = _stacked(trainings, schema)
        with self.worker.at(first.rank) as parameters, only(parameters, first.names):
            if first.names is not None:
                write(parameters, first.start)  # what these clients do not train is as the model has it
            models, totals = self.trainer.train(starts, tasks, first.round, first.privacy, pulls)
        return (
            (Pieces(vector, schema.layout), _metrics(task, seen, first.privacy))
            for task, vector, seen in zip(tasks, models, totals)
        )


@dataclass
class Together:
    """Stands where the transport of other engines does: (client, packet) pairs in,
    replies out, block by block.

    Args:
        worker: holds the base; answers what is not training.
        open: makes the trainer of these tensors (None: of all) of clients of this rank, once the adapter is
            on the base; None where the base does not allow it.
        data: a client's training examples.
    """

    worker: Worker
    settings: SimulationSection
    open: Callable[[tuple[str, ...] | None, int], CohortTrainer | None]
    data: Callable[[str], ClientData]
    _trainers: dict[tuple[tuple[str, ...] | None, int], CohortTrainer | None] = field(default_factory=dict)

    def trainer(self, names: tuple[str, ...] | None, rank: int = 0) -> CohortTrainer | None:
        found = (
            self._trainers.pop((names, rank)) if (names, rank) in self._trainers else self.open(names, rank)
        )
        self._trainers[names, rank] = found
        while len(self._trainers) > MOST_TRAINERS:
            del self._trainers[next(iter(self._trainers))]
        return found

    def __call__(
        self, pairs: Sequence[tuple[str, bytes]], kind: str = "train", round: int = 0
    ) -> Iterator[Reply]:
        # one packet is sent to all who train the same
        for payload in dict.fromkeys(payload for _, payload in pairs):
            clients = [client for client, sent in pairs if sent is payload or sent == payload]
            if kind_of(payload) != "model":
                yield from self._one_by_one(payload, clients)
                continue
            bundle = self.worker.open()
            packet = decode(payload, bundle.schema, kinds=["model"], frame=bundle.frame_digest)
            work = asked(bundle, packet)
            trainer = self.trainer(work.names, work.rank)
            if trainer is None:
                yield from self._one_by_one(payload, clients)
                continue
            train = Stacked(self.worker, trainer).train_each
            size = self.settings.block or block_size(
                trainer.schema.size * (KEPT if method_of(self.worker.job).keeps else 1),
                memory_for(self.settings) // 2,
            )
            for begin in range(0, len(clients), size):
                block = [(client, self.data(client)) for client in clients[begin : begin + size]]
                for client, found in updates(self.worker, train, packet, work, block, in_process):
                    if isinstance(found, Refused):
                        yield Reply(client, None, str(found))
                    else:
                        yield Reply(client, None, packet=found[0], size=found[1])

    def _one_by_one(self, payload: bytes, clients: Sequence[str]) -> Iterator[Reply]:
        for client in clients:
            try:
                yield Reply(client, self.worker.handle(payload, client, self.data(client)))
            except Refused as e:
                yield Reply(client, None, str(e))


def _task(job: Job, one: ClientTraining) -> Task:
    if one.privacy is None or one.noise is None:
        return Task(one.client, one.data, training_batches(job, one.client, one.data, one.round, one.purpose))
    return Task(one.client, one.data, poisson_batches(len(one.data), one.privacy, one.noise), noise=one.noise)


def _flat(arrays: Arrays, schema: Schema) -> np.ndarray:
    return np.concatenate([arrays[t.name].ravel() for t in schema.tensors])


def _only_proximal(pull: Pull, job: Job) -> bool:
    """Whether it is that of federation.proximal, which every trainer has of its own."""
    return (
        pull.strength == job.federation.proximal
        and not pull.ascent
        and pull.towards is pull.offset is pull.moving is None
    )


def _stacked(trainings: Sequence[ClientTraining], schema: Schema) -> tuple[np.ndarray, Pulls]:
    """(starts, float32 [K, P], and pulls) of trainings, in the order of the schema."""
    starts, pulls = (
        np.stack([_flat(one.start, schema) for one in trainings]),
        [one.pull for one in trainings],
    )
    towards = np.stack(
        [start if pull.towards is None else _flat(pull.towards, schema) for pull, start in zip(pulls, starts)]
    )
    (ascent,) = {pull.ascent for pull in pulls}
    offset, moving = (
        _rows([_flat(a, schema) for a in arrays if a is not None], len(trainings))
        for arrays in ([pull.offset for pull in pulls], [pull.moving for pull in pulls])
    )
    strength = torch.tensor([[pull.strength] for pull in pulls], dtype=torch.float32)
    return starts, Pulls(
        strength, torch.from_numpy(towards), offset, ascent, None if moving is None else moving > 0
    )


def _rows(vectors: Sequence[np.ndarray], count: int) -> Tensor | None:
    """[count, P]; None where there are none."""
    assert len(vectors) in (0, count)
    return torch.from_numpy(np.stack(vectors)) if vectors else None


def _metrics(task: Task, seen: np.ndarray, private: ExamplePrivacy | None) -> Metrics:
    """Of one client's training, from what its trainer summed."""
    if private is not None:
        assert task.noise is not None
        return noisy_metrics(seen, private, task.noise)
    loss, correct, count = seen.tolist()
    return {"loss": (loss, count), "accuracy": (correct, count)}


def memory_for(settings: SimulationSection) -> int:
    """Bytes that the engine may use beside the base: those of the job, or half of what is free now.

    Half of them are for features.
    """
    return settings.memory_mb * 2**20 if settings.memory_mb else psutil.virtual_memory().available // 2


def block_size(numbers: int, memory: int) -> int:
    """Clients trained together: as many models of `numbers` as fit in `memory` bytes,
    at most MOST_TOGETHER.
    """
    return max(1, min(MOST_TOGETHER, memory // (4 * COPIES * numbers)))
