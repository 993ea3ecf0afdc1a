"""`python -m fedtune.client.supernode_process PARENT …`: Flower's flower-supernode command, with shorter
sleeps, ended with its parent.

Flower's loop sleeps 3 s between questions to the coordinator and 0.5 s between looks for a reply. Here the
first follows how long nothing has come (a tenth of it, within bounds), so that a device in a running job
answers quickly and an idle one asks rarely; the second is a tenth of a second.

And a message whose run ends while it is received is dropped whole. Flower 1.41 drops it from its own hands
alone: the task stays, and whoever took it asks for the missing message for more than an hour
(supernode/start_client_internal.py: the cleanup is under `except Exception`, which RunNotRunningException, a
BaseException, passes by).
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

from fedtune.process.child import end_with_parent
from fedtune.process.flower import check_version
from fedtune.process.waits import DEVICE_IDLE_POLL, DEVICE_POLL, DEVICE_REPLY_POLL, Pace

_IDLE = 1.0  # of Flower's sleeps, the longer ones are between questions


def shorten_sleeps(module: ModuleType, pace: Pace) -> None:
    """Gives the module a `time` whose sleep is ours; everything else of it stays."""

    def sleep(seconds: float) -> None:
        if seconds < _IDLE:  # a message is being worked on
            pace.active()
            time.sleep(min(seconds, DEVICE_REPLY_POLL))
        else:
            time.sleep(min(seconds, pace.next()))

    module.time = SimpleNamespace(**{name: getattr(time, name) for name in dir(time)} | {"sleep": sleep})  # type: ignore[attr-defined]


def drop_whole(module: ModuleType) -> None:
    """Makes the end of a run, during the receipt of a message, a failure like any other,
    which Flower clears up after.
    """
    from flwr.supercore.run import RunNotRunningException

    receive = module._pull_and_store_message  # type: ignore[attr-defined]

    def ordinary(call: Callable) -> Callable:
        def called(*args: object) -> object:
            try:
                return call(*args)
            except RunNotRunningException as e:
                raise RuntimeError("its run has ended") from e

        return called

    def received(*, pull_object: Callable, confirm_message_received: Callable, **others: object) -> object:
        return receive(
            pull_object=ordinary(pull_object),
            confirm_message_received=ordinary(confirm_message_received),
            **others,
        )

    module._pull_and_store_message = received  # type: ignore[attr-defined]


def main() -> None:
    end_with_parent(int(sys.argv.pop(1)), signal.SIGTERM)
    check_version()
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    shorten_sleeps(start_client_internal, Pace(DEVICE_POLL, DEVICE_IDLE_POLL))
    drop_whole(start_client_internal)
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
