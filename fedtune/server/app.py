"""The coordinator's side of the transport: Flower messages around our packets."""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedtune.bundles.offer import one_line
from fedtune.errors import EnvironmentProblem
from fedtune.process.waits import LATE_SECONDS, SERIAL_POLL
from fedtune.round.replies import Exchange, Pairs, Reply
from fedtune.wire import RECORD


def round_robin(grid: Grid, clients: Sequence[str]) -> list[int]:
    """Simulated nodes are interchangeable, so clients go round them;
    the message names the client it is for.
    """
    nodes = sorted(grid.get_node_ids())
    if clients and not nodes:
        raise EnvironmentProblem("no node is connected, so nobody can be asked to train")
    return [nodes[i % len(nodes)] for i in range(len(clients))]


@dataclass
class GridExchange:
    """Sends packets and yields the replies as they come, until all are in or the deadline has passed.

    Attributes:
        deadline: seconds.
        route: the node of each client; None for one that is not there any more.
        facts: further values that go with every packet.
        poll: seconds between looks when nothing has come.
        idle: called at every such look.
    """

    grid: Grid
    deadline: float
    route: Callable[[Grid, Sequence[str]], Sequence[int | None]] = round_robin
    facts: Mapping[str, str] = field(default_factory=dict)
    poll: float = SERIAL_POLL
    idle: Callable[[], None] = lambda: None
    _late: dict[str, tuple[str, float]] = field(default_factory=dict)

    def __call__(self, pairs: Pairs, kind: str = "train", round: int = 0) -> Iterator[Reply]:
        """Replies that come after their own exchange ended are yielded by a later one, marked late."""
        waiting = self._send(pairs, kind, round)
        end = time.monotonic() + self.deadline
        while waiting and time.monotonic() < end:
            arrived = list(self.grid.pull_messages([*waiting, *self._late]))
            for message in arrived:
                number = message.metadata.reply_to_message_id
                if number in waiting:
                    yield to_reply(message, waiting.pop(number))
                elif number in self._late:
                    yield to_reply(message, self._late.pop(number)[0], late=True)
            if not arrived:
                self.idle()
                time.sleep(min(self.poll, max(0.0, end - time.monotonic())))
        self._forget()
        self._late |= {
            number: (client, time.monotonic() + LATE_SECONDS) for number, client in waiting.items()
        }

    def _send(self, pairs: Pairs, kind: str, round: int) -> dict[str, str]:
        """Client by message id.

        Who is not there, and a message that Flower would not store, is answered by nobody and not waited for.

        Flower names what it stores by its hash; the salt keeps a device from announcing something else by the
        name of another's message.
        """
        nodes = self.route(self.grid, [client for client, _ in pairs])
        here = [(client, packet, node) for (client, packet), node in zip(pairs, nodes) if node is not None]
        messages = [
            Message(
                RecordDict(
                    {
                        RECORD: ConfigRecord(
                            {"packet": packet, "client": client, "salt": secrets.token_hex(16), **self.facts}
                        )
                    }
                ),
                node,
                kind,
                ttl=self.deadline + LATE_SECONDS,
                group_id=str(round),
            )
            for client, packet, node in here
        ]
        numbers = self.grid.push_messages(messages) if messages else []
        return {number: client for number, (client, *_) in zip(numbers, here) if number}

    def _forget(self) -> None:
        now = time.monotonic()
        self._late = {number: known for number, known in self._late.items() if known[1] > now}


def to_reply(message: Message, client: str, late: bool = False) -> Reply:
    """A Flower reply as ours: its payload, or why there is none.

    The client is the one the question went to.
    """
    if message.has_error():
        return Reply(client, None, short(message.error.reason) or f"error code {message.error.code}", late)
    record = message.content.get(RECORD)
    packet = record.get("packet") if isinstance(record, ConfigRecord) else None
    if isinstance(packet, bytes):
        return Reply(client, packet, late=late)
    reason = record.get("refused") if isinstance(record, ConfigRecord) else None
    return Reply(client, None, short(str(reason or "")) or "reply without a packet", late)


def short(text: str | None) -> str:
    """The last line of what came from outside, as it may be shown: a traceback ends with what happened."""
    return one_line(((text or "").strip().splitlines() or [""])[-1])[:200]


def make_server_app(run: Callable[[Exchange], None], deadline: float) -> ServerApp:
    """A ServerApp in which `run` takes one simulated job to its end over the exchange that it is given."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(GridExchange(grid, deadline))

    return app
