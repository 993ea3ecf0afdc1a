"""Flower's SuperNode as a child process, and the executor of ours that answers its tasks. All that leans on
Flower's internals on the device side stands here and in `supernode_process`.

A SuperNode in "process" isolation only carries messages: it waits until an executor asks for a task, hands it
the message and takes the reply. Flower's own executor would unpack the app bundle that came from the
coordinator, put it first on a new process' path and import from it. Ours lives in this process, never unpacks
that bundle, and calls the app it was given.
"""

import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads these at import
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import httpx
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedtune.process.flower import check_version
from fedtune.process.waits import SUPERNODE_STOP, TASK_IDLE_POLL, TASK_POLL, Pace

log = logging.getLogger(__name__)
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


@dataclass(frozen=True)
class NodeSettings:
    """Where the coordinator is and who we are.

    Without `ca` nothing is encrypted; `folder` is private to this device.
    """

    server: str
    ca: Path | None
    key: Path | None
    folder: Path


class SuperNode:
    """A running SuperNode.

    `stop` ends it; `exited` says whether it has ended by itself, `said` what it said last.
    """

    def __init__(self, settings: NodeSettings) -> None:
        check_version()
        settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._log = settings.folder / "supernode.log"
        self.secret = secrets.token_bytes(32)
        secret = settings.folder / "runtime.secret"
        secret.unlink(missing_ok=True)
        with os.fdopen(os.open(secret, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as f:
            f.write(self.secret)
        self.port = _free_port()
        identity = (
            ["--insecure"]
            if settings.ca is None
            else ["--root-certificates", str(settings.ca), "--auth-supernode-private-key", str(settings.key)]
        )
        command = [
            sys.executable,
            "-P",
            "-m",
            "fedtune.client.supernode_process",
            str(os.getpid()),
            "--superlink",
            settings.server,
            *identity,
            "--isolation",
            "process",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--superexec-auth-secret-file",
            str(secret),
        ]
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"FLWR_HOME": str(settings.folder / "flwr"), "FLWR_LOG_LEVEL": "WARNING"},
            )

    @property
    def exited(self) -> bool:
        return self._process.poll() is not None

    def said(self) -> str:
        """The end of its log."""
        return self._log.read_bytes()[-4000:].decode(errors="replace")

    def stop(self) -> None:
        if not self.exited:
            self._process.terminate()
            try:
                self._process.wait(SUPERNODE_STOP)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def execute(node: SuperNode, app: ClientApp, stop: threading.Event) -> None:
    """Answers the node's tasks with `app`, one after another, until `stop` is set or the node ends.

    Every task gets a reply, an error if need be: without one the SuperNode would wait for ever.
    """
    interceptors = [
        RuntimeVersionHttpInterceptor(component_name="SuperExec"),
        SuperExecAuthHttpInterceptor(master_secret=node.secret, protected_methods={ACQUIRE}),
    ]
    client = _connect(node, interceptors)
    pace = Pace(TASK_POLL, TASK_IDLE_POLL)
    try:
        while not stop.is_set() and not node.exited:
            try:
                found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            except httpx.HTTPError:  # it is starting or ending
                stop.wait(pace.next())
                continue
            if found.HasField("task") and found.token:
                _work(node, found.token, app)
                pace.active()
            stop.wait(pace.next())
    finally:
        client.close()


def _work(node: SuperNode, token: str, app: ClientApp) -> None:
    client = _connect(
        node,
        [RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), RuntimeTokenHttpInterceptor(token)],
    )
    heartbeat = HeartbeatSender(lambda: _beat(client))
    heartbeat.start()
    try:
        # the fourth is the coordinator's app bundle: not unpacked, not kept
        message, context, _, _ = pull_task_input(client)
        push_message(client, _answered(app, message, context), context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
    # as when its run has ended meanwhile
    except (httpx.HTTPError, ObjectPullError, RuntimeError, ValueError) as e:
        log.warning("a task was lost: %s", e)
    finally:
        heartbeat.stop()
        client.close()


def _answered(app: ClientApp, message: Message, context: Context) -> Message:
    try:
        return app(message=message, context=context)
    # anything unforeseen costs this reply, not the device; its text may hold data, so only its kind is sent
    except Exception as e:
        log.exception("the app failed")
        return Message(Error(code=0, reason=f"the device failed with {type(e).__name__}"), reply_to=message)


def _beat(client: RuntimeHttpClient) -> bool:
    """Flower's own heartbeat interrupts the process when it is turned down;
    ours lets the task run to its end.
    """
    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.HTTPError:
        return False
    return True


def _connect(node: SuperNode, interceptors: list) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        f"127.0.0.1:{node.port}", insecure=True, root_certificates=None, interceptors=interceptors
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
