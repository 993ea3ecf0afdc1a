"""pfl-research's simulation with its PyTorch backend: SimulatedBackend, FederatedAveraging,
one model kept in memory.
"""

import asyncio
import logging
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from contenders.serve import Commands, Stopwatch
from contenders.work import BATCH, CASES, STEPS, Order, Plain, drawn, moved, shuffled
from fedtune.data.encoded import ClientData


class Trained(nn.Module):
    """The model with the two methods that pfl asks for; it adds up its losses."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.model, self.plain = plain.model, plain
        self.total, self.predictions = 0.0, 0

    def loss(self, *batch: Tensor, names: tuple[str, ...]) -> Tensor:
        *inputs, labels = batch
        loss = self.plain.loss(dict(zip(names, inputs)), labels)
        self.total += loss.item() * len(labels)
        self.predictions += len(labels)
        return loss

    def metrics(self, *batch: Tensor) -> dict[str, Any]:
        """pfl asks for this method and, as nothing is evaluated, does not call it."""
        raise NotImplementedError


class Texts(Dataset):
    """A user's texts: shuffled for each epoch, each batch padded to its longest."""

    def __init__(self, plain: Plain, data: ClientData, **options: Any) -> None:
        super().__init__(raw_data=(data.labels,), **options)
        self.plain, self.held = plain, data

    def iter(self, batch_size: int | None) -> Iterator[list[Tensor]]:
        for index in shuffled(len(self.held)):
            inputs, labels = self.plain.collate(self.held, index)
            yield [*inputs.values(), labels]


def users(plain: Plain, name: str) -> dict[str, Dataset]:
    """Everybody's data, made once.

    Who holds a single batch has pfl's own Dataset, which keeps its batches.
    """
    if CASES[name].idle:
        return {client: Dataset((np.zeros(BATCH),), user_id=client) for client in plain.setup.split.clients}
    found = {}
    for client, data in plain.data.items():
        inputs, labels = plain.collate(data, np.arange(min(BATCH, len(data))))
        options = {"user_id": client, "train_kwargs": {"names": tuple(inputs)}}
        found[client] = (
            Texts(plain, data, **options)
            if len(data) > BATCH
            else Dataset((*inputs.values(), labels), **options)
        )
    return found


def run(order: Order, commands: Commands) -> None:
    name = order.case
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(order.threads)
    asyncio.set_event_loop(asyncio.new_event_loop())  # pfl runs each round on the loop that it finds
    plain = Plain(name, order.cohort)
    module, held = Trained(plain), users(plain, name)
    clients = (client for round in count(1) for client in drawn(plain.setup, round))
    data = FederatedDataset(held.__getitem__, lambda: next(clients))
    backend = SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()])
    model = PyTorchModel(
        module, lambda parameters, lr: plain.optimizer(), torch.optim.SGD(plain.trained.values(), lr=1.0)
    )
    whole = CASES[name].idle or plain.fed.local_epochs == 1
    training = NNTrainHyperParams(
        local_batch_size=BATCH,
        local_learning_rate=plain.fed.lr,
        local_num_epochs=None if whole else plain.fed.local_epochs,
        local_num_steps=(0 if CASES[name].idle else STEPS) if whole else None,
    )
    algorithm = FederatedAveraging()
    # iteration 0 is always evaluated, on all data of every client before and after
    algorithm._current_central_iteration = 1
    commands.ready()
    while command := commands.next():
        module.total, module.predictions, watch = 0.0, 0, Stopwatch()
        last = algorithm._current_central_iteration + command["rounds"]
        algorithm.run(
            NNAlgorithmParams(last, last + 1, order.cohort, None),
            backend,
            model,
            training,
            NNEvalHyperParams(BATCH),
            send_metrics_to_platform=False,
        )
        arrays = {n: p.detach().numpy() for n, p in plain.trained.items()}
        commands.answer(
            seconds=watch.seconds(),
            loss=module.total / max(1, module.predictions),
            moved=moved(plain.start, arrays),
        )
