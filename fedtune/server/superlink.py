"""Flower's SuperLink inside this process, with only its Fleet API open to the network.

All that leans on Flower's internals here.

Flower 1.41 serves three APIs on one port: Fleet (devices), Control (start and stop runs, register devices;
open to anyone in the free version) and Runtime (run apps). Behind a door that lets only Fleet through, the
other two cannot be reached from outside; what a coordinator needs of them is called in this process.
"""

import base64
import hashlib
import io
import logging
import os
import threading
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads these at import
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import uvicorn
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, SubStatus
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.dependencies.linkstate import get_linkstate
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.superlink.servicer.runtime import runtime_handlers
from sqlalchemy.exc import SQLAlchemyError

from fedtune.errors import EnvironmentProblem, UserError
from fedtune.process.flower import check_version
from fedtune.process.waits import LATE_SECONDS, SUPERLINK_POLL, SUPERLINK_START, SUPERLINK_STOP

log = logging.getLogger(__name__)
DOOR = "/v1/fleet/"
UNKNOWN = (
    412,
    b'{"code": %d, "detail": "Failed to activate SuperNode."}' % ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED,
)
"""As Flower tells a SuperNode whose key it does not know; at a 401 it would end without a word."""
MAX_OBJECTS = 8  # that a reply consists of; ours are three: message, records, and the record with the packet


@dataclass(frozen=True)
class Tls:
    """PEM files of the server."""

    certificate: Path
    key: Path


@dataclass
class SuperLink:
    """A running SuperLink.

    `body_limit` is the largest request a device may send, in bytes;
    `keys` are those let in, None: anybody is.
    """

    state: LinkState
    body_limit: int
    keys: set[bytes] | None

    def register(self, name: str, public_key: bytes) -> int:
        """Lets the device with this key (PEM) in; its node id. Does nothing new for a key that is known."""
        if self.keys is not None:
            self.keys.add(public_key)
        known = self.state.get_node_id_by_public_key(public_key)
        return (
            known
            if known is not None
            else self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, 0, name=name)
        )

    def unregister(self, node: int) -> None:
        if self.keys is not None:
            self.keys -= {key for key, number in self.registered().items() if number == node}
        self.state.delete_node(NOOP_FLWR_AID, node)

    def registered(self) -> dict[bytes, int]:
        """Node ids by public key (PEM), of all that are let in."""
        found = self.state.get_node_info(owner_aids=[NOOP_FLWR_AID])
        return {bytes(node.public_key): node.node_id for node in found if node.status != "unregistered"}

    def online(self) -> dict[int, str]:
        """Devices whose heartbeat is fresh: node id -> when it last joined."""
        return {
            node.node_id: node.last_activated_at for node in self.state.get_node_info(statuses=["online"])
        }

    @contextmanager
    def run(self) -> Iterator["LinkGrid"]:
        """Opens a Flower run and its grid; ends it, with all its messages, on the way out.

        Runs a crash left open are ended first.
        """
        self._end_all()
        fab = _empty_app()
        self.state.store_fab(fab)
        number = self.state.create_run(
            "fedtune/coordinator",
            "1.0.0",
            fab.hash_str,
            {},
            NOOP_FEDERATION_ID,
            None,
            NOOP_FLWR_AID,
            TaskType.SERVER_APP,
        )
        run = self.state.get_run_info(run_ids=[number])[0]
        task = int(run.primary_task_id or 0)
        if not number or not self.state.claim_task(task) or not self.state.activate_task(task):
            raise EnvironmentProblem(
                "Flower would not open a run; its state file may be damaged, move it away and start again"
            )
        heartbeat = HeartbeatSender(lambda: self.state.acknowledge_task_heartbeat(task))
        heartbeat.start()
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = number, task, SUPERLINK_NODE_ID
        try:
            yield LinkGrid(self.state, run, Task(task_id=task, run_id=number, type=TaskType.SERVER_APP))
            self.state.finish_task(task, SubStatus.COMPLETED, "")
        finally:
            heartbeat.stop()
            self._end_all()

    def _end_all(self) -> None:
        for run in self.state.get_run_info():
            self.state.stop_run(run.run_id)
            self.state.cleanup_run(run.run_id)


@dataclass(frozen=True)
class _Arriving:
    """A reply that a device has announced: its parts come one after another."""

    number: str
    parts: tuple[str, ...]
    since: float


class LinkGrid(HttpGrid):
    """Flower's own grid, whose calls go to the handlers in this process and not over HTTP.

    Nothing that a device sends, or does not finish sending, makes a call wait or raise.
    """

    def __init__(self, state: LinkState, run: Run, task: Task) -> None:
        super().__init__(token="in-process")
        self._client = _Handlers(state, task)  # type: ignore[assignment]
        self._state, self._number, self._arriving = state, run.run_id, dict[str, _Arriving]()
        self.set_run(run)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As Flower's; "" for messages that were not sent, because a device has announced other
        parts by the names of theirs.
        """
        messages = list(messages)
        try:
            return super().push_messages(messages)
        except ValueError as e:
            log.warning("messages could not be sent: %s", e)
            return [""] * len(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are whole by now.

        One that is none, or did not arrive in LATE_SECONDS, becomes an error.
        """
        asked = set(message_ids)
        if new := asked - self._arriving.keys():
            found = self._client.PullMessages(PullAppMessagesRequest(message_ids=new))  # type: ignore[union-attr]
            for reply, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                parts = tuple(part.object_id for part in iterate_object_tree(tree))
                self._arriving[reply.metadata.reply_to_message_id] = _Arriving(
                    reply.metadata.message_id, parts, time.monotonic()
                )
        arrived: list[Message] = []
        for question in list(self._arriving):
            late = time.monotonic() - self._arriving[question].since > LATE_SECONDS
            message = self._arrived(question, late) if question in asked else None
            if message is not None or late:
                reply = self._arriving.pop(question)
                confirmed = ConfirmMessageReceivedRequest(message_object_id=reply.number)
                self._client.ConfirmMessageReceived(confirmed)  # type: ignore[union-attr]
            if message is not None:
                arrived.append(message)
        return arrived

    def _arrived(self, question: str, late: bool) -> Message | None:
        """The reply, an error in its place, or None while parts are missing."""
        reply, contents = self._arriving[question], dict[str, bytes]()
        for part in reply.parts:
            content = self._state.get_object(self._number, part)
            if content is None:
                return _no_reply(question, "its reply did not arrive whole")
            if not content:
                return _no_reply(question, "its reply did not arrive in time") if late else None
            contents[part] = content
        try:
            message = inflate_object_from_contents(reply.number, contents)
            if not isinstance(message, Message) or not (
                message.has_error() or isinstance(message.content, RecordDict)
            ):
                raise ValueError(f"is a {type(message).__name__}")
        except Exception as e:  # whatever Flower's readers make of bytes from outside
            return _no_reply(question, f"its reply is not a message ({type(e).__name__})")
        # not what it says itself
        message.metadata.__dict__.update(_message_id=reply.number, _reply_to_message_id=question)
        return message


def _no_reply(question: str, reason: str) -> Message:
    facts = Metadata(0, "", SUPERLINK_NODE_ID, SUPERLINK_NODE_ID, question, "", time.time(), 0.0, "system")
    return make_message(facts, error=Error(0, reason))


class _Handlers:
    """The calls that HttpGrid makes of a RuntimeHttpClient, by name."""

    def __init__(self, state: LinkState, task: Task) -> None:
        self._state, self._task = state, task

    def GetNodes(self, request: Any) -> Any:
        return runtime_handlers.get_nodes(request, self._state, self._task)

    def PushMessages(self, request: Any) -> Any:
        return runtime_handlers.push_messages(request, self._state, self._task)

    def PullMessages(self, request: Any) -> Any:
        return runtime_handlers.pull_messages(request, self._state, self._task)

    def PushObject(self, request: Any) -> Any:
        return runtime_handlers.push_object(request, self._state, self._task)

    def PullObject(self, request: Any) -> Any:
        return runtime_handlers.pull_object(request, self._state, self._task)

    def ConfirmMessageReceived(self, request: Any) -> Any:
        return runtime_handlers.confirm_message_received(request, self._state, self._task)

    def close(self) -> None:
        pass


@contextmanager
def superlink(host: str, port: int, state: Path, tls: Tls | None, body_limit: int) -> Iterator[SuperLink]:
    """Serves until the block ends. Without `tls` nothing is encrypted and any device is let in.

    Raises EnvironmentProblem when the port cannot be had, UserError when the certificate cannot be read.
    """
    check_version()
    _quiet()
    app = create_app(_config(host, port, state, tls), _NothingElse)  # type: ignore[arg-type]
    link = SuperLink(app.state.linkstate_factory.state(), body_limit, None if tls is None else set())
    app.dependency_overrides[get_linkstate] = lambda: _ForDevices(link.state)
    files: dict[str, Any] = (
        {} if tls is None else {"ssl_certfile": str(tls.certificate), "ssl_keyfile": str(tls.key)}
    )
    config = uvicorn.Config(
        _Door(app, link),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=int(SUPERLINK_STOP),
        **files,
    )
    try:
        config.load()
    except (OSError, ValueError) as e:
        raise UserError(
            f"{tls.certificate if tls else host}: cannot be used for TLS ({e}); "
            "make it again with `fedtune provision`"
        ) from None
    with _serving(uvicorn.Server(config), host, port):
        try:
            yield link
        except SQLAlchemyError as e:
            reason = " ".join(str(getattr(e, "orig", None) or e).split())[:200]
            raise EnvironmentProblem(
                f"{state}: Flower's state cannot be kept ({reason}); free space, check permissions; "
                "the same command continues"
            ) from None


@contextmanager
def _serving(server: uvicorn.Server, host: str, port: int) -> Iterator[None]:
    def serve() -> None:
        with suppress(SystemExit):  # uvicorn's way of saying that the port is taken
            server.run()

    thread = threading.Thread(target=serve, name="superlink", daemon=True)
    thread.start()
    for _ in range(int(SUPERLINK_START / SUPERLINK_POLL)):
        if server.started or not thread.is_alive():
            break
        time.sleep(SUPERLINK_POLL)
    if not server.started:
        raise EnvironmentProblem(
            f"cannot listen on {host}:{port}; is another service there, or is the address not this "
            "machine's? give another --address"
        )
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(SUPERLINK_STOP + 1)


class _ForDevices:
    """The state as requests of devices see it.

    What they may store are replies of few parts; Flower would also take questions that say they come from the
    coordinator. A device that comes again before its last heartbeat has run out (it was killed and started)
    is let in at once; Flower would turn it away until then.
    """

    def __init__(self, state: LinkState) -> None:
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        self._state.deactivate_node(node_id)
        return self._state.activate_node(node_id, heartbeat_interval)

    def store_message_and_object_tree(
        self, message: Message, tree: ObjectTree, session: str
    ) -> tuple[bool, list[str]]:
        if (
            not message.metadata.reply_to_message_id
            or sum(1 for _ in iterate_object_tree(tree)) > MAX_OBJECTS
        ):
            return False, []
        return self._state.store_message_and_object_tree(message, tree, session)


class _Door:
    """ASGI: lets requests of the Fleet API through that name a key which is let in, up to the body limit;
    all else is answered here.

    Flower reads a request whole before it looks at the key. Whether the key's owner signed it, Flower checks.
    """

    def __init__(self, app: Any, link: SuperLink) -> None:
        self._app, self._link = app, link

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not scope["path"].startswith(DOOR):
            await _answer(send, 404, b"not found")
        elif self._link.keys is not None and _key(scope) not in self._link.keys:
            await _answer(
                send, *(UNKNOWN if scope["path"] == DOOR + "activate-node" else (401, b"unknown key"))
            )
        elif _length(scope) > self._link.body_limit:
            await _answer(send, 413, b"too large")
        else:
            await self._app(scope, *self._limited(receive, send))

    def _limited(self, receive: Any, send: Any) -> tuple[Any, Any]:
        """Both, for senders that give no or a wrong length: past the limit the request ends as if they had
        hung up, and they are hung up on.
        """
        left = self._link.body_limit

        async def counted() -> dict[str, Any]:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        async def closing(message: dict[str, Any]) -> None:
            if left < 0 and message["type"] == "http.response.start":
                message |= {"status": 413, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        return counted, closing


def _length(scope: dict[str, Any]) -> int:
    value = dict(scope["headers"]).get(b"content-length", b"0")
    return int(value) if value.isdigit() and len(value) < 20 else 0


def _key(scope: dict[str, Any]) -> bytes:
    """The public key (PEM) that a request names; empty for none."""
    try:
        return base64.b64decode(
            dict(scope["headers"]).get(FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode(), b""), validate=True
        )
    except ValueError:
        return b""


async def _answer(send: Any, status: int, text: bytes) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"text/plain"), (b"connection", b"close")],
        }
    )
    await send({"type": "http.response.body", "body": text})


class _NothingElse:
    """In place of Flower's lifespan, which would also start its executor and old gRPC servers."""

    def __init__(self, config: SuperLinkLifespanConfig, state_factory: object) -> None:
        pass

    def startup(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def _config(host: str, port: int, state: Path, tls: Tls | None) -> SuperLinkLifespanConfig:
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=host,
        port=port,
        insecure=tls is None,
        certificates=None,
        superexec_auth_secret=None,
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=tls is not None,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(state),
        isolation="process",
        runtime_dependency_install=False,
    )


def _empty_app() -> Fab:
    """Flower wants an app bundle with each run.

    Ours names nothing that could be run: devices run what they have installed.
    """
    text = (
        '[project]\nname = "coordinator"\nversion = "1.0.0"\n[tool.flwr.app]\npublisher = "fedtune"\n'
        '[tool.flwr.app.components]\nserverapp = "none:app"\nclientapp = "none:app"\n[tool.flwr.app.config]\n'
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        # ZipInfo: a fixed date, so that the hash is always the same
        z.writestr(zipfile.ZipInfo("pyproject.toml"), text)
    return Fab(hashlib.sha256(packed.getvalue()).hexdigest(), packed.getvalue(), {})


def _quiet() -> None:
    """Flower's and uvicorn's own lines go through logging like ours, without the handlers that they bring."""
    for name in ("flwr", "uvicorn", "uvicorn.error", "alembic"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.CRITICAL if name.startswith("uvicorn") else logging.WARNING)
