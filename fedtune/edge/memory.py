"""Resident memory of this process, and how much work at once keeps it below a limit."""

import resource
import sys
from collections.abc import Callable

from fedtune.errors import UserError

MB = 10**6
SPARE = 0.05
"""Share of a limit that stays free: for what later batches scatter, and for what is read and sent."""


def resident() -> int:
    """Bytes in memory now, mapped files among them; the largest so far where the system does not say."""
    return _status("VmRSS") or peak()


def peak() -> int:
    """The most bytes that were ever in memory."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or (found if sys.platform == "darwin" else found * 1024)


def _status(key: str) -> int:
    """A figure of /proc/self/status in bytes; 0 without one. getrusage counts the parent of a new
    process in, this does not.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:")), 0)
    except OSError:
        return 0


def rows_within(limit_mb: int, most: int, run: Callable[[int], None], weights: int) -> int:
    """How many of the largest examples may go through at once, between 1 and `most`,
    as tried steps tell. limit_mb 0: no limit.

    Args:
        run: makes a step of so many examples.
        weights: bytes of the file that the graph maps. What tried steps did not touch of it,
            rows of a word table, later ones may.

    Raises UserError when a step of one takes more.
    """
    if not limit_mb:
        return most
    limit, before, mapped = limit_mb * MB * (1 - SPARE), resident(), _status("RssFile")
    run(1)
    untouched = max(0, weights - (_status("RssFile") - mapped))
    one = peak() + untouched
    if one > limit:
        needed = int(one / (1 - SPARE) / MB) + 1
        raise UserError(
            f"--memory-mb {limit_mb}: a step of one example takes {one / MB:.0f} MB here, "
            f"and {SPARE:.0%} stays free; give at least {needed}"
        )
    # the first step also brought weights in, so a second row takes less than this
    if most == 1 or one + (peak() - before) > limit:
        return 1
    run(2)
    two = peak() + untouched
    return min(most, 2 + int(max(0.0, limit - two) / max(two - one, 1))) if two <= limit else 1
