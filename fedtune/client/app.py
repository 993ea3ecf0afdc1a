"""A Flower ClientApp that hands packets to a worker.

It runs no code and reads no path that a message brings.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.bundles.offer import Offer, OfferAnswer, job_name, one_line
from fedtune.errors import FedtuneError, Refused
from fedtune.process.flower import failure
from fedtune.wire import RECORD


def make_client_app(answer: Callable[[bytes, str], bytes]) -> ClientApp:
    """For simulations: `answer` takes (packet, client name) and returns the packet to send back.

    What fails there for a reason that is no client's own ends the run.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _reply(message, lambda values: {"packet": answer(*_question(values))}, failure)

    return app


def make_device_app(
    accept: Callable[[Offer], OfferAnswer],
    train: Callable[[str, bytes, str], bytes],
    evaluate: Callable[[str, bytes], bytes],
) -> ClientApp:
    """For devices: `accept` answers an offer; `train` takes (job, packet, client name),
    `evaluate` (job, packet).
    """
    app = ClientApp()

    @app.query()
    def on_query(message: Message, context: Context) -> Message:
        return _reply(message, lambda values: accept(Offer.load(values)).dump())

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        return _reply(
            message, lambda values: {"packet": train(job_name(values.get("job")), *_question(values))}
        )

    @app.evaluate()
    def on_evaluate(message: Message, context: Context) -> Message:
        return _reply(
            message, lambda values: {"packet": evaluate(job_name(values.get("job")), _question(values)[0])}
        )

    return app


def _reply(
    message: Message,
    work: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    beside: Callable[[FedtuneError], Mapping[str, str]] = lambda e: {},
) -> Message:
    """An error that fedtune raises on purpose goes back as one line; the round goes on without this
    client. beside: what else is said of it.
    """
    record = message.content.get(RECORD)
    try:
        values = work(record if isinstance(record, ConfigRecord) else {})
    except FedtuneError as e:
        values = {"refused": one_line(str(e)), **beside(e)}
    return Message(RecordDict({RECORD: ConfigRecord(dict(values))}), reply_to=message)


def _question(values: Mapping[str, Any]) -> tuple[bytes, str]:
    """(packet, client) of a message. Raises Refused for any other content."""
    packet, client = values.get("packet"), values.get("client")
    if not isinstance(packet, bytes) or not isinstance(client, str):
        raise Refused("message", "holds no packet and client")
    return packet, client
