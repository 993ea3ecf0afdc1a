"""Every wait of a live federation, in seconds, in one place. Nothing waits without one of these or a key of the job.

The job's own: federation.deadline (a round waits for replies).
"""

import time
from collections.abc import Iterator

DEVICE_POLL = 0.25  # a device asks the coordinator for messages at least so far apart
DEVICE_IDLE_POLL = 3.0  # and at most so far apart, when nothing has come for long (Flower's own is always 3)
DEVICE_REPLY_POLL = 0.1  # a SuperNode looks for the app's reply (Flower's own is 0.5)
TASK_POLL = 0.1  # the app looks for a task, while there is work
TASK_IDLE_POLL = 1.0  # and when there is none
SERIAL_POLL = 0.02  # the coordinator of a simulation looks for replies
GRID_POLL = 0.05  # the coordinator looks for replies (Flower's own grid: 3)
QUEUE_POLL = 1.0  # an idle coordinator looks for jobs
LOBBY_POLL = 0.25  # the coordinator looks for devices, while it waits for them
OFFER_SECONDS = 300.0  # a device answers an offer: it may have to load a base
ASK_AGAIN_SECONDS = 60.0  # a device that refused or did not answer is asked again
LATE_SECONDS = 600.0  # replies that come after a round's deadline are still taken in for so long, to be counted
WATCH_POLL = 0.25  # a device looks whether its SuperNode still lives
GOODBYE_SECONDS = 10.0  # a device that must stop lets its last answer go out
STEADY_SECONDS = 60.0  # a connection that held so long starts the backoff anew
CONNECT_SECONDS = 10.0  # a device's first look at the coordinator: connection and TLS
BACKOFF_FIRST, BACKOFF_MOST = 1.0, 60.0  # a device that cannot connect tries again, each time waiting twice as long


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
