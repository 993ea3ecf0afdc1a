"""The vectorised engine: answers a round's packets by training the whole cohort together,
in blocks that fit in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import psutil
import torch
from torch import Tensor

from fedtune.adapters.methods import write
from fedtune.common.seeds import generator
from fedtune.data.encoded import ClientData
from fedtune.errors import Refused
from fedtune.job import SimulationSection
from fedtune.privacy.example import ExamplePrivacy, example_privacy, noisy_metrics, poisson_batches
from fedtune.privacy.noise import noise_of
from fedtune.privacy.plan import outward
from fedtune.round.asked import Asked, asked
from fedtune.round.batches import local_batches
from fedtune.round.coordinator import Reply
from fedtune.stateful.base import Training
from fedtune.stateful.methods import method_of
from fedtune.training import keeping
from fedtune.training.chunks import Task, trainable_batches
from fedtune.training.cohort import CohortTrainer, Pulls
from fedtune.training.holder import require_converged
from fedtune.training.local import only
from fedtune.training.worker import Worker
from fedtune.types import Arrays, Metrics
from fedtune.wire import (
    Header,
    Packet,
    Pieces,
    Schema,
    decode,
    encode,
    finite_norm,
    kind_of,
    layout,
    packed_size,
)

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
            keeps = method_of(self.worker.job).keeps is not None
            size = self.settings.block or block_size(
                trainer.schema.size * (KEPT if keeps else 1), memory_for(self.settings) // 2
            )
            for begin in range(0, len(clients), size):
                block = clients[begin : begin + size]
                yield from (
                    self._keeping(trainer, packet, block)
                    if keeps
                    else self._block(trainer, packet, work, block)
                )

    def _one_by_one(self, payload: bytes, clients: Sequence[str]) -> Iterator[Reply]:
        for client in clients:
            try:
                yield Reply(client, self.worker.handle(payload, client, self.data(client)))
            except Refused as e:
                yield Reply(client, None, str(e))

    def _block(
        self, trainer: CohortTrainer, packet: Packet, work: Asked, clients: Sequence[str]
    ) -> Iterator[Reply]:
        round, private = packet.header.round, example_privacy(self.worker.job)
        tasks = [self._task(client, round, private) for client in clients]
        start = np.concatenate([work.model[t.name].ravel() for t in trainer.schema.tensors])
        try:
            with self.worker.at(work.rank) as parameters, only(parameters, work.names):
                if work.names is not None:
                    write(parameters, work.model)  # what these clients do not train is as the model has it
                models, totals = trainer.train(start, tasks, round, private)
        except Refused as e:  # a mechanism that is broken is broken for all
            yield from (Reply(client, None, str(e)) for client in clients)
            return
        for task, vector, seen in zip(tasks, models, totals):
            try:
                yield self._reply(task, trainer.schema, packet.header, vector, _metrics(task, seen, private))
            except Refused as e:
                yield Reply(task.client, None, str(e))

    def _keeping(self, trainer: CohortTrainer, packet: Packet, clients: Sequence[str]) -> Iterator[Reply]:
        """As `_block`, each client from what it keeps, with all the trainings that its method asks for."""
        bundle, kept, schema, round = (
            self.worker.open(),
            self.worker.kept,
            trainer.schema,
            packet.header.round,
        )
        held = [self.data(client) for client in clients]
        found = [keeping.begin(bundle, kept, packet, client, data) for client, data in zip(clients, held)]
        wanted = [method_of(bundle.job).trainings(bundle.job, one) for one in found]
        asked = [(client, data, ask) for client, data, its in zip(clients, held, wanted) for ask in its]
        tasks = [
            Task(client, data, keeping.batches_of(bundle, client, data, round, ask.purpose))
            for client, data, ask in asked
        ]
        models, totals = np.empty((len(asked), schema.size), np.float32), np.empty((len(asked), 3))
        for rows in _turns([ask for *_, ask in asked], schema):
            begun = {row: Pieces(models[row - 1], schema.layout) | asked[row][-1].start for row in rows}
            starts, pulls = _stacked(
                [replace(asked[row][-1], start=start) for row, start in begun.items()], schema
            )
            models[rows], totals[rows] = trainer.train(
                starts, [tasks[row] for row in rows], round, pulls=pulls
            )
        ends = list(accumulate(map(len, wanted), initial=0))
        for client, data, one, own in zip(clients, held, found, map(range, ends, ends[1:])):
            try:
                trained = [(Pieces(models[row], schema.layout), _summed(totals[row])) for row in own]
                update, metrics = keeping.end(bundle, kept, packet, client, one, trained)
                weight, metrics = outward(bundle.job, len(data), metrics)
                yield Reply(
                    client,
                    encode(
                        "update",
                        bundle.schema,
                        update,
                        round=round,
                        frame=bundle.frame_digest,
                        weight=weight,
                        metrics=metrics,
                    ),
                )
            except Refused as e:
                yield Reply(client, None, str(e))

    def _task(self, client: str, round: int, private: ExamplePrivacy | None) -> Task:
        job, data = self.worker.job, self.data(client)
        if private is not None:
            noise = noise_of(job, round, client)
            return Task(client, data, poisson_batches(len(data), private, noise), noise=noise)
        fed = job.federation
        batches = local_batches(
            data.lengths,
            fed.batch_size,
            fed.local_epochs,
            fed.local_steps,
            generator(fed.seed, "local", round, client),
        )
        return Task(client, data, trainable_batches(data, list(batches), job.model.task))

    def _reply(
        self, task: Task, trained: Schema, sent: Header, vector: np.ndarray, metrics: Metrics
    ) -> Reply:
        """As Worker and the wire make it of one client's training, without the bytes in between.

        Raises Refused as they do.
        """
        bundle, norm = self.worker.open(), finite_norm(vector)
        weight, metrics = outward(self.worker.job, len(task.data), metrics)
        header = Header(
            kind="update",
            schema_digest=bundle.schema.digest,
            frame=bundle.frame_digest,
            round=sent.round,
            weight=weight,
            tensors=sent.train,
            metrics={name: [total, share] for name, (total, share) in metrics.items()},
        )
        arrays = Pieces(vector, trained.layout)
        if bundle.ranks is not None:
            pieces = bundle.ranks.split(arrays)
            arrays = Pieces(
                np.concatenate([piece.ravel() for piece in pieces.values()]),
                layout((name, piece.shape) for name, piece in pieces.items()),
            )
        return Reply(
            task.client, None, packet=Packet(header, arrays, norm), size=packed_size(header, bundle.schema)
        )


def _turns(asked: Sequence[Training], schema: Schema) -> list[list[int]]:
    """Places of trainings that go together, in the order of time: one that begins where the one before it
    ended comes a turn later.
    """
    turns, turn = list[list[int]](), 0
    for row, ask in enumerate(asked):
        turn = 0 if len(ask.start) == len(schema.tensors) else turn + 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(row)
    return turns


def _stacked(asked: Sequence[Training], schema: Schema) -> tuple[np.ndarray, Pulls]:
    """(starts, float32 [K, P], and pulls) of trainings, in the order of the schema."""

    def flat(arrays: Arrays) -> np.ndarray:
        return np.concatenate([arrays[t.name].ravel() for t in schema.tensors])

    starts = np.stack([flat(ask.start) for ask in asked])
    towards = np.stack(
        [start if ask.pull.towards is None else flat(ask.pull.towards) for ask, start in zip(asked, starts)]
    )
    (ascent,) = {ask.pull.ascent for ask in asked}
    offset, moving = (
        _rows([flat(a) for a in arrays if a is not None], len(asked))
        for arrays in ([ask.pull.offset for ask in asked], [ask.pull.moving for ask in asked])
    )
    strength = torch.tensor([[ask.pull.strength] for ask in asked], dtype=torch.float32)
    return starts, Pulls(
        strength, torch.from_numpy(towards), offset, ascent, None if moving is None else moving > 0
    )


def _rows(vectors: Sequence[np.ndarray], count: int) -> Tensor | None:
    """[count, P]; None where there are none."""
    assert len(vectors) in (0, count)
    return torch.from_numpy(np.stack(vectors)) if vectors else None


def _metrics(task: Task, seen: np.ndarray, private: ExamplePrivacy | None) -> Metrics:
    """Of one client's training, from what its trainer summed.

    Raises Refused for a training whose loss is not a number.
    """
    if private is not None:
        assert task.noise is not None
        return noisy_metrics(seen, private, task.noise)
    metrics = _summed(seen)
    require_converged(metrics)
    return metrics


def _summed(seen: np.ndarray) -> Metrics:
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
