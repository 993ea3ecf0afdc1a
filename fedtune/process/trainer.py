"""How a trainer process serves: keeps one device's model in memory and works for the light
process that started it.

    python -m fedtune.training.service CONFIG.json    with torch
    python -m fedtune.edge.service CONFIG.json        with onnxruntime

It listens on a Unix socket in a folder that only its user may enter. Service `fedtune.Trainer`,
bytes in and bytes out:

    Open        -> JSON of the device's facts; reads the data and loads the model, once
    Handle      packet, client's name as metadata "client-bin" -> packet
    Evaluate    packet -> packet of kind "scores"

beside the standard health service: "" serves as soon as the socket listens, "fedtune.Trainer" once the device
is open. Health is answered while work runs. An error raised on purpose has its message as the status's
details and the name of its class as trailing metadata "error"; any other is "bug", with type and message, and
its traceback goes to stderr, which is the log.

The process ends after `idle_seconds` without a request, with its parent, and at once on SIGTERM:
it holds nothing to save.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedtune.errors import ContractError, FedtuneError
from fedtune.process.child import end_with_parent, require_parent
from fedtune.process.waits import TRAINER_CHECK as CHECK_SECONDS
from fedtune.process.waits import TRAINER_CLOSE as CLOSE_SECONDS

SERVICE = "fedtune.Trainer"
CLIENT, ERROR, BUG = "client-bin", "error", "bug"
MAX_MESSAGE = 512 * 2**20
OPTIONS = (("grpc.max_send_message_length", MAX_MESSAGE), ("grpc.max_receive_message_length", MAX_MESSAGE))
ANSWERING = 4  # threads that take requests: one waits for the work, the others answer health
# characters of a message; a status travels in a header, which has room for 64 KiB when percent-encoded
MAX_DETAILS = 2000


@dataclass(frozen=True)
class Config:
    """What CONFIG.json holds. base "": the one that the bundle names; threads 0:
    all cores; idle_seconds 0: never.

    Without torch, `graphs` is the folder that `fedtune prepare --edge` made; memory_mb 0: no limit. kept:
    where this device keeps its own of the job; "": nowhere.
    """

    socket: str
    bundle: str
    data: str
    base: str
    graphs: str
    memory_mb: int
    threads: int
    idle_seconds: float
    parent: int
    kept: str = ""


class Device(Protocol):
    """What does the work: `fedtune.training.holder.Device`."""

    def facts(self) -> dict[str, Any]: ...
    def handle(self, packet: bytes, client: str) -> bytes: ...
    def evaluate(self, packet: bytes) -> bytes: ...


class Trainer:
    """The three methods. Work is done by one thread, one request after the other."""

    def __init__(self, open_: Callable[[], Device], on_open: Callable[[], None] = lambda: None) -> None:
        self._open, self._on_open = open_, on_open
        self._device: Device | None = None
        # one thread for all work: OpenMP keeps a team of threads for each that calls it
        self._work = ThreadPoolExecutor(1, "work")
        self._lock = threading.Lock()
        self._active, self._last = 0, time.monotonic()

    def idle(self) -> float:
        """Seconds since the last request ended; 0 while one is worked on."""
        with self._lock:
            return 0.0 if self._active else time.monotonic() - self._last

    def open(self, body: bytes, context: grpc.ServicerContext) -> bytes:
        return self._answer(lambda: json.dumps(self.device().facts()).encode(), context)

    def handle(self, body: bytes, context: grpc.ServicerContext) -> bytes:
        client = dict(context.invocation_metadata()).get(CLIENT, b"")
        return self._answer(lambda: self.device().handle(body, client.decode()), context)

    def evaluate(self, body: bytes, context: grpc.ServicerContext) -> bytes:
        return self._answer(lambda: self.device().evaluate(body), context)

    def device(self) -> Device:
        """Opened by the first request; a request after one that failed tries again,
        as the user may have mended the data.
        """
        if self._device is None:
            self._device = self._open()
            self._on_open()
        return self._device

    def _answer(self, work: Callable[[], bytes], context: grpc.ServicerContext) -> bytes:
        with self._lock:
            self._active += 1
        try:
            return self._work.submit(work).result()
        except ContractError as e:  # a caller inside fedtune is wrong: nothing that a user could mend
            _abort(context, grpc.StatusCode.INTERNAL, BUG, e)
        except FedtuneError as e:
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, type(e).__name__, e)
        except Exception as e:
            _abort(context, grpc.StatusCode.INTERNAL, BUG, e)
        finally:
            with self._lock:
                self._active, self._last = self._active - 1, time.monotonic()
        raise AssertionError("abort raises")


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, name: str, error: Exception) -> None:
    text = str(error)
    if name == BUG:
        traceback.print_exception(error)
        text = " ".join(f"{type(error).__name__}: {text}".split())
    context.set_trailing_metadata(((ERROR, name),))
    context.abort(code, text[:MAX_DETAILS])


def serve(config: Config, open_: Callable[[], Device]) -> None:
    """Serves until the time without requests is over.

    Never returns otherwise: the parent's end or a signal ends the process.
    """
    status = health.HealthServicer()
    trainer = Trainer(open_, lambda: status.set(SERVICE, health_pb2.HealthCheckResponse.SERVING))
    server = grpc.server(ThreadPoolExecutor(ANSWERING, "answer"), options=OPTIONS)
    methods = {"Open": trainer.open, "Handle": trainer.handle, "Evaluate": trainer.evaluate}
    # no serialisers: bytes
    handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    status.set("", health_pb2.HealthCheckResponse.SERVING)
    status.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
    server.add_insecure_port(f"unix:{config.socket}")  # nobody else can enter the socket's folder
    server.start()
    while not config.idle_seconds or trainer.idle() < config.idle_seconds:
        time.sleep(CHECK_SECONDS)
        require_parent(config.parent)
    server.stop(CLOSE_SECONDS).wait()


def run(arguments: list[str], ready: Callable[[Config], Callable[[], Device]]) -> None:
    """A trainer process, from its arguments to its end.

    `ready` imports what is heavy and returns what opens the device.
    """
    # Ctrl-C reaches the whole process group; the parent decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # warnings to stderr; gRPC would swallow its own
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    config = Config(**json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    end_with_parent(config.parent, signal.SIGKILL)
    # OpenMP threads that spin while they wait make a busy machine several times slower;
    # read when torch is first imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    serve(config, ready(config))
    sys.stderr.flush()
    os._exit(0)  # not held up by threads
