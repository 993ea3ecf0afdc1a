"""The vectorised engine: answers a round's packets by training the whole cohort together, in blocks that fit in memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

from fedtune.errors import Refused
from fedtune.job import SimulationSection
from fedtune.rounds import Reply
from fedtune.seeds import generator
from fedtune.training.batches import local_batches
from fedtune.training.chunks import Task, trainable_batches
from fedtune.training.cohort import CohortTrainer
from fedtune.training.local import ClientData
from fedtune.training.worker import Worker
from fedtune.wire import Header, Packet, Pieces, Schema, decode, kind_of, packed_size, quick_norm

MOST_TOGETHER = 256
"""Clients in a block unless the job says otherwise: beyond it nothing is gained, and replies come seldom."""
COPIES = 8
"""Arrays as large as a model that each client of a block needs: values, gradient, two moments, a chunk's copies, and what is sent."""


@dataclass
class Together:
    """Stands where the transport of other engines does: (client, packet) pairs in, replies out, block by block.

    Args:
        worker: holds the base; answers what is not training.
        open: makes the trainer, once the adapter is on the base; None where the base does not allow it.
        data: a client's training examples.
    """

    worker: Worker
    settings: SimulationSection
    open: Callable[[], CohortTrainer | None]
    data: Callable[[str], ClientData]
    _trainer: CohortTrainer | None = None
    _opened: bool = field(default=False)

    def __call__(self, pairs: Sequence[tuple[str, bytes]], kind: str = "train", round: int = 0) -> Iterator[Reply]:
        if not pairs or kind_of(pairs[0][1]) != "model":
            yield from self._one_by_one(pairs)
            return
        self.worker.open()
        if not self._opened:
            self._trainer, self._opened = self.open(), True
        if self._trainer is None:
            yield from self._one_by_one(pairs)
            return
        packets: dict[bytes, Packet] = {}
        size = self.settings.block or block_size(self.worker.spec.size, memory_for(self.settings) // 2)
        for begin in range(0, len(pairs), size):
            yield from self._block(self._trainer, pairs[begin : begin + size], packets)

    def _one_by_one(self, pairs: Sequence[tuple[str, bytes]]) -> Iterator[Reply]:
        for client, payload in pairs:
            try:
                yield Reply(client, self.worker.handle(payload, client, self.data(client)))
            except Refused as e:
                yield Reply(client, None, str(e))

    def _block(self, trainer: CohortTrainer, pairs: Sequence[tuple[str, bytes]], packets: dict[bytes, Packet]) -> Iterator[Reply]:
        schema, fed, model = self.worker.spec.schema, self.worker.job.federation, self.worker.job.model
        for _, payload in pairs:  # one packet is sent to all who train the same, so it is read once
            if payload not in packets:
                packets[payload] = decode(payload, schema, kinds=["model"], frame=self.worker.frame_digest)
        (packet,) = {id(packets[p]): packets[p] for _, p in pairs}.values()
        round = packet.header.round
        tasks = []
        for client, _ in pairs:
            data = self.data(client)
            batches = local_batches(data.lengths, fed.batch_size, fed.local_epochs, fed.local_steps, generator(fed.seed, "local", round, client))
            tasks.append(Task(client, data, trainable_batches(data, list(batches), model.task)))
        models, totals = trainer.train(packet.arrays.vector, tasks, round)
        for task, vector, scores in zip(tasks, models, totals.tolist()):
            yield self._reply(task, vector, scores, schema, round)

    def _reply(self, task: Task, vector: np.ndarray, scores: list[float], schema: Schema, round: int) -> Reply:
        """As Worker and the wire make it of one client's training, without the bytes in between."""
        loss, correct, count = scores
        norm = quick_norm(vector)
        if not math.isfinite(loss):
            return Reply(task.client, None, str(Refused("not-finite", "training diverged here: its loss is not a number; a lower federation.lr may help")))
        if not math.isfinite(norm) and not np.isfinite(vector).all():
            return Reply(task.client, None, str(Refused("not-finite", "a tensor holds NaN or infinity")))
        header = Header(
            kind="update", schema_digest=schema.digest, frame=self.worker.frame_digest or "", round=round, weight=float(len(task.data)),
            metrics={"loss": [loss, count], "accuracy": [correct, count]},
        )
        return Reply(task.client, None, packet=Packet(header, Pieces(vector, schema.layout), norm), size=packed_size(header, schema))


def memory_for(settings: SimulationSection) -> int:
    """Bytes that the engine may use beside the base: those of the job, or half of what is free now. Half of them are for features."""
    return settings.memory_mb * 2**20 if settings.memory_mb else psutil.virtual_memory().available // 2


def block_size(numbers: int, memory: int) -> int:
    """Clients trained together: as many models of `numbers` as fit in `memory` bytes, at most MOST_TOGETHER."""
    return max(1, min(MOST_TOGETHER, memory // (4 * COPIES * numbers)))
