"""A Flower ServerApp whose strategy delegates every decision to our Coordinator. All that knows Flower on this side."""

import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy

from fedtune.errors import EnvironmentProblem
from fedtune.rounds import Coordinator, Reply
from fedtune.wire import RECORD

POLL_SECONDS = 0.02
Exchange = Callable[[list[tuple[str, bytes]]], Iterator[Reply]]
"""Sends (client, packet) pairs and yields the replies as they come, until all are in or the deadline has passed."""


class FedTuneStrategy(Strategy):
    """Flower's view of a run: rounds 1..N of train messages, no evaluate messages (the coordinator evaluates).

    `prepare` is called once with an exchange, may use it for what precedes round 1 (a gradient initialisation), and returns
    the coordinator, which may stand at any round: unlike Flower's loop this one resumes, and reads replies as a stream.
    """

    def __init__(self, prepare: Callable[[Exchange], Coordinator], deadline: float) -> None:
        self.prepare, self.deadline = prepare, deadline
        self.coordinator: Coordinator | None = None
        self._clients: dict[str, str] = {}

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        return self._messages(grid, self._run().plan(), server_round)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        report = self._run().finish(to_reply(m, self._clients) for m in replies)
        return None, MetricRecord({"clients": len(report.clients), "refused": len(report.refused)})

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        pass

    def start(self, grid: Grid, initial_arrays: ArrayRecord | None = None, num_rounds: int = 0, *args: object, **kwargs: object) -> Result:
        """Runs what is left of the run. The model, the number of rounds and the deadline are the job's, not arguments."""
        self.coordinator = self.prepare(lambda pairs: self._exchange(grid, pairs))
        self.coordinator.begin()
        while not self.coordinator.done:
            number = self.coordinator.state.round + 1
            messages = self.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
            self.aggregate_train(number, self._stream(grid, messages))
        return Result()

    def _run(self) -> Coordinator:
        if self.coordinator is None:
            raise RuntimeError("FedTuneStrategy.start makes the coordinator; call that")
        return self.coordinator

    def _exchange(self, grid: Grid, pairs: list[tuple[str, bytes]]) -> Iterator[Reply]:
        for message in self._stream(grid, self._messages(grid, pairs, 0)):
            yield to_reply(message, self._clients)

    def _messages(self, grid: Grid, pairs: list[tuple[str, bytes]], round: int) -> list[Message]:
        """One message a pair. Simulated nodes are interchangeable, so pairs go round the nodes and name the client they act for."""
        nodes = sorted(grid.get_node_ids())
        if pairs and not nodes:
            raise EnvironmentProblem("no node is connected, so nobody can be asked to train")
        return [
            Message(RecordDict({RECORD: ConfigRecord({"packet": packet, "client": client})}), nodes[i % len(nodes)], "train",
                    ttl=self.deadline, group_id=str(round))
            for i, (client, packet) in enumerate(pairs)
        ]

    def _stream(self, grid: Grid, messages: Iterable[Message]) -> Iterator[Message]:
        """Replies one by one until all came or the deadline passed. Remembers which message was for which client."""
        messages = list(messages)
        names = [str(m.content[RECORD]["client"]) for m in messages]
        waiting = dict(zip(grid.push_messages(messages), names))
        self._clients |= waiting
        end = time.monotonic() + self.deadline
        while waiting and time.monotonic() < end:
            arrived = list(grid.pull_messages(list(waiting)))
            for message in arrived:
                waiting.pop(message.metadata.reply_to_message_id, None)
                yield message
            if not arrived:
                time.sleep(POLL_SECONDS)


def to_reply(message: Message, clients: dict[str, str]) -> Reply:
    """A Flower reply as ours: its payload, or why there is none. The client is the one the question went to."""
    client = clients.get(message.metadata.reply_to_message_id, "unknown")
    if message.has_error():
        return Reply(client, None, (message.error.reason or f"error code {message.error.code}").strip().splitlines()[-1][:200])
    record = message.content.get(RECORD)
    packet = record.get("packet") if isinstance(record, ConfigRecord) else None
    if isinstance(packet, bytes):
        return Reply(client, packet)
    reason = record.get("refused") if isinstance(record, ConfigRecord) else None
    return Reply(client, None, str(reason or "reply without a packet")[:200])


def make_server_app(prepare: Callable[[Exchange], Coordinator], deadline: float) -> ServerApp:
    """A ServerApp that runs one job to its end."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        FedTuneStrategy(prepare, deadline).start(grid)

    return app
