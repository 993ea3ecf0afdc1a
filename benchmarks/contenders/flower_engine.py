"""Flower's simulation engine with a plain app: two workers that load the model once, the Message API, FedAvg.

The app is in this module, and not in the script, so that Ray sends its functions by name.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read at import
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import logging
from collections.abc import Iterable
from functools import lru_cache
from itertools import count, islice
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from contenders.serve import Commands, Stopwatch
from contenders.work import CASES, STEPS, Order, Plain, drawn, moved, open_case, shuffled

WORKERS = 2
client_app = ClientApp()


@lru_cache(maxsize=1)
def opened(name: str) -> Plain:
    """In a worker: everything that rounds have in common, made once."""
    torch.set_num_threads(1)
    return Plain(name)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    name = str(message.content["config"]["case"])
    if CASES[name].idle:
        return reply(message, message.content["arrays"], 1, 0.0, 1)
    plain = opened(name)
    data = plain.data[plain.setup.split.clients[int(context.node_config["partition-id"])]]
    with torch.no_grad():
        for parameter, array in zip(plain.trained.values(), message.content["arrays"].to_numpy_ndarrays()):
            parameter.copy_(torch.from_numpy(array))
    optimizer, total, examples = plain.optimizer(), 0.0, 0
    batches = (index for _ in range(plain.fed.local_epochs) for index in shuffled(len(data)))
    for index in islice(batches, STEPS):
        optimizer.zero_grad()
        loss = plain.loss(*plain.collate(data, index))
        loss.backward()
        optimizer.step()
        total += loss.item() * len(index)
        examples += len(index)
    arrays = ArrayRecord([p.detach().numpy() for p in plain.trained.values()])
    return reply(message, arrays, len(data), total, examples)


@client_app.query()
def partition(message: Message, context: Context) -> Message:
    return Message(
        RecordDict({"place": MetricRecord({"place": int(context.node_config["partition-id"])})}),
        reply_to=message,
    )


def reply(message: Message, arrays: ArrayRecord, examples: int, loss: float, predictions: int) -> Message:
    metrics = MetricRecord({"num-examples": examples, "loss": loss, "predictions": predictions})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Drawn(FedAvg):
    """FedAvg that asks those who are drawn for the round, as the other contenders do."""

    def __init__(self, places: Iterable[list[int]], nodes: dict[int, int], asked: int) -> None:
        super().__init__(fraction_evaluate=0.0, train_metrics_aggr_fn=summed)
        self.places, self.nodes, self.asked = iter(places), nodes, asked

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return self._construct_messages(
            record, [self.nodes[place] for place in next(self.places)], MessageType.TRAIN
        )

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        errors = [m.error.reason for m in replies if m.has_error()]
        if errors or len(replies) != self.asked:
            raise RuntimeError(f"{len(replies)} replies, {errors[:1]}")
        return super().aggregate_train(server_round, replies)


def summed(records: list[RecordDict], weighted_by: str) -> MetricRecord:
    """Sums of loss and predictions, so that the mean is one over predictions."""
    return MetricRecord({key: sum(r["metrics"][key] for r in records) for key in ("loss", "predictions")})


def run(order: Order) -> None:
    commands, server_app = Commands(), ServerApp()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    setup = open_case(order.case, order.cohort)
    places = {client: place for place, client in enumerate(setup.split.clients)}

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            plain = Plain(order.case)
            draws = ([places[client] for client in drawn(setup, round)] for round in count(1))
            strategy = Drawn(draws, nodes_by_place(grid, len(places)), order.cohort)
            rounds(commands, strategy, grid, order.case, plain)
        except BaseException:
            logging.getLogger("flwr").exception("server")
            os._exit(1)  # the engine would wait for the clients of a server that has failed

    run_simulation(
        server_app,
        client_app,
        num_supernodes=len(places),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": WORKERS, "logging_level": "ERROR", "log_to_driver": False},
        },
    )


def nodes_by_place(grid: Grid, clients: int) -> dict[int, int]:
    """Which node holds which client's data; also starts the workers."""
    messages = [Message(RecordDict(), node, MessageType.QUERY) for node in grid.get_node_ids()]
    found = {
        int(m.content["place"]["place"]): m.metadata.src_node_id for m in grid.send_and_receive(messages)
    }
    assert len(found) == clients
    return found


def rounds(commands: Commands, strategy: FedAvg, grid: Grid, name: str, plain: Plain) -> None:
    """What the driver asks for, a block at a time."""
    arrays = ArrayRecord(list(plain.start.values()))
    commands.ready()
    while command := commands.next():
        watch = Stopwatch()
        result = strategy.start(
            grid, arrays, num_rounds=command["rounds"], train_config=ConfigRecord({"case": name})
        )
        seconds, arrays = watch.seconds(), result.arrays
        sums = result.train_metrics_clientapp.values()
        loss = sum(m["loss"] for m in sums) / sum(m["predictions"] for m in sums)
        commands.answer(
            seconds=seconds,
            loss=loss,
            moved=moved(plain.start, dict(zip(plain.start, arrays.to_numpy_ndarrays()))),
        )
