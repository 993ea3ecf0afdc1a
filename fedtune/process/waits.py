"""Every wait of a live federation, in seconds, in one place. Nothing waits without one of these, or
a key of the job: federation.deadline (a round waits for replies) and server.wait (the coordinator
waits for enough devices).

What Flower waits for and cannot be told otherwise: a device that lost the coordinator tries again after up to
20 s; a device is taken for gone when it was silent for 60 s; a single request may take 30 s.
"""

import time
from collections.abc import Iterator

# A device and its coordinator
DEVICE_POLL = 0.25  # a device asks the coordinator for messages at least so far apart
DEVICE_IDLE_POLL = 3.0  # and at most so far apart, when nothing has come for long (Flower's own is always 3)
DEVICE_REPLY_POLL = 0.1  # a SuperNode looks for the app's reply (Flower's own is 0.5)
TASK_POLL = 0.1  # the app looks for a task, while there is work
TASK_IDLE_POLL = 1.0  # and when there is none
CONNECT_SECONDS = 10.0  # a device's first look at the coordinator: connection and TLS
# a device that cannot connect tries again, each time waiting twice as long, for ever
BACKOFF_FIRST, BACKOFF_MOST = 1.0, 60.0
STEADY_SECONDS = 60.0  # a connection that held so long starts the backoff anew
WATCH_POLL = 0.25  # a device looks whether its SuperNode still lives
GOODBYE_SECONDS = 10.0  # a device that must stop lets its last answer go out
SUPERNODE_STOP = 10.0  # a SuperNode may say goodbye; then it is killed

# A device and its trainer
# from start to a healthy process: a few seconds of imports, more from a cold disk or on a busy machine
TRAINER_START = 120.0
TRAINER_HEALTH = 10.0  # an idle trainer answers in milliseconds; one that takes longer hangs
TRAINER_STOP = 5.0  # from SIGTERM to SIGKILL
TRAINER_DEATH = 5.0  # from a lost connection to the end of the process that was behind it; then it is killed
TRAINER_POLL = 0.02  # between looks at a process that starts
TRAINER_CHECK = 0.5  # the trainer looks whether its parent lives, and how long it was idle
# a request that comes in the instant of idle exit is given this long, then its caller tries again
TRAINER_CLOSE = 1.0

# The coordinator
SUPERLINK_START = 30.0  # to bind the port
SUPERLINK_STOP = 5.0  # for open requests to end
SUPERLINK_POLL = 0.05  # between looks at a port that is being bound
SERIAL_POLL = 0.02  # the coordinator of a simulation looks for replies
GRID_POLL = 0.05  # a live coordinator looks for replies (Flower's own grid: 3)
LOBBY_POLL = 0.25  # the coordinator looks for devices, and into their answers
ROSTER_POLL = 1.0  # the coordinator looks for device keys that were added or taken away
QUEUE_POLL = 1.0  # an idle coordinator looks for jobs
OFFER_SECONDS = 300.0  # a device answers an offer: it may have to load a base
ASK_AGAIN_SECONDS = 60.0  # a device that refused is asked again
# a device answers a question of a secure sum that needs no training; no longer than federation.deadline
STAGE_SECONDS = 60.0
# replies that come after a round's deadline are still taken in for so long, to be counted
LATE_SECONDS = 600.0
DESK_SECONDS = 5.0  # service.json is written at least so often
LEDGER_SECONDS = 30.0  # another process may hold the ledger


class Pace:
    """How long to wait before looking again: a tenth of how long nothing has happened, within bounds."""

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most, self._last = least, most, time.monotonic()

    def active(self) -> None:
        """Something happened."""
        self._last = time.monotonic()

    def next(self) -> float:
        return min(self.most, max(self.least, (time.monotonic() - self._last) / 10))


def backoff() -> Iterator[float]:
    """BACKOFF_FIRST, doubled each time, up to BACKOFF_MOST, for ever."""
    wait = BACKOFF_FIRST
    while True:
        yield wait
        wait = min(2 * wait, BACKOFF_MOST)
