"""A Flower ClientApp that hands packets to a worker. It runs no code and reads no path that a message brings."""

from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.errors import FedtuneError, Refused
from fedtune.wire import RECORD


def make_client_app(answer: Callable[[bytes, str], bytes]) -> ClientApp:
    """`answer` takes (packet, client name) and returns the packet to send back.

    An error that fedtune raises on purpose goes back as one line; the round goes on without this client.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            reply = ConfigRecord({"packet": answer(*_question(message.content.get(RECORD)))})
        except FedtuneError as e:
            reply = ConfigRecord({"refused": str(e).replace("\n", " ")[:200]})
        return Message(RecordDict({RECORD: reply}), reply_to=message)

    return app


def _question(record: object) -> tuple[bytes, str]:
    """(packet, client) of a message. Raises Refused for any other content."""
    packet, client = (record.get("packet"), record.get("client")) if isinstance(record, ConfigRecord) else (None, None)
    if not isinstance(packet, bytes) or not isinstance(client, str):
        raise Refused("message", "holds no packet and client")
    return packet, client
