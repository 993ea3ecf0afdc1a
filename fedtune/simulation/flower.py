"""Two ways to run a ServerApp and a ClientApp in a simulation.

What leans on Flower's internals stands here, with a guard.
"""

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it at import
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; without it Ray warns

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedtune.errors import EnvironmentProblem
from fedtune.process.flower import check_version, require_no_failure
from fedtune.wire import RECORD

RUN_ID = 1


class SerialGrid(Grid):
    """A Flower Grid in this process: a pushed message waits until it is pulled,
    then its client runs, one at a time.

    So a strategy that pulls sees replies as a stream, and only one update is in memory.
    """

    def __init__(self, app: ClientApp, nodes: int) -> None:
        self._app, self._nodes = app, nodes
        self._waiting: deque[Message] = deque()
        self._run = Run.create_empty(run_id=RUN_ID)
        self._sent = 0

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._nodes + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)  # Flower's own grids set it so
            self._waiting.append(message)
            ids.append(str(self._sent))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        for _ in range(len(self._waiting)):
            message = self._waiting.popleft()
            if message.metadata.message_id in wanted:
                answered = self._answer(message)
                _require_no_failure(answered)
                return [answered]
            self._waiting.append(message)
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        ids = list(self.push_messages(messages))
        return [reply for _ in ids for reply in self.pull_messages(ids)]

    def _answer(self, message: Message) -> Message:
        context = Context(
            run_id=RUN_ID,
            node_id=message.metadata.dst_node_id,
            node_config={},
            state=RecordDict(),
            run_config={},
        )
        try:
            return self._app(message, context)
        # as in every Flower engine, a client that fails costs its reply and not the run
        except Exception as e:
            return Message(Error(code=0, reason=f"{type(e).__name__}: {e}"), reply_to=message)


def run_serial(server: ServerApp, client: ClientApp) -> None:
    """One after another in this process: the slow obvious twin of the other engines."""
    check_version()
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN_ID, RUN_ID, RUN_ID
    server(
        SerialGrid(client, 1),
        Context(run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config={}),
    )


def run_ray(server: ServerApp, client: ClientApp, workers: int) -> None:
    """Through Flower's own simulation engine, with `workers` client processes at once."""
    check_version()
    try:
        import ray  # noqa: F401
        from flwr.simulation import run_simulation
    except ModuleNotFoundError:
        raise EnvironmentProblem(
            'simulation.engine = "ray" needs the package ray; '
            'install "flwr[simulation]==1.41.0" or use engine = "serial"'
        ) from None
    workers = workers or os.cpu_count() or 1
    with _interruptible() as stopped, _errors_only("flwr"):
        run_simulation(
            _stopping(server, stopped),
            client,
            num_supernodes=workers,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": workers, "logging_level": "ERROR", "log_to_driver": False},
            },
        )


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that is set on Ctrl-C, before anything else learns of it, and at the end."""
    stopped, main = threading.Event(), threading.current_thread() is threading.main_thread()

    def interrupt(number: int, frame: object) -> None:
        stopped.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt) if main else None
    try:
        yield stopped
    finally:
        stopped.set()
        if main:
            signal.signal(signal.SIGINT, before)


def _stopping(server: ServerApp, stopped: threading.Event) -> ServerApp:
    """The same app, ended by `stopped`. Flower runs it in a thread that outlives the interrupted
    simulation: there it would take the dying workers' errors for replies and record a void round,
    then wait for the deadline.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        pull = grid.pull_messages

        def pull_unless_stopped(message_ids: Iterable[str]) -> Iterable[Message]:
            found = list(pull(message_ids))
            if stopped.is_set():
                raise EnvironmentProblem("the simulation was stopped")
            for message in found:
                _require_no_failure(message)
            return found

        grid.pull_messages = pull_unless_stopped  # type: ignore[method-assign]
        server(grid, context)

    return app


def _require_no_failure(message: Message) -> None:
    """Raises what would have failed any client, so that the run ends there."""
    record = message.content.get(RECORD) if message.has_content() else None
    if isinstance(record, ConfigRecord):
        require_no_failure(record)


@contextmanager
def _errors_only(logger: str) -> Iterator[None]:
    """Hides a library's notices and warnings, such as Flower's that run_simulation will be
    replaced by its own command.
    """
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)
