"""The waits of a live federation: none endless, all in proportion."""

from itertools import islice, pairwise

import pytest

from fedtune.process import waits
from fedtune.process.waits import Pace, backoff


def test_backoff_doubles_up_to_its_bound_and_never_ends():
    found = list(islice(backoff(), 100))
    assert found[0] == waits.BACKOFF_FIRST and found[-1] == waits.BACKOFF_MOST
    assert all(b == min(2 * a, waits.BACKOFF_MOST) for a, b in pairwise(found))


def test_a_pace_follows_how_long_nothing_has_happened(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fedtune.process.waits.time.monotonic", lambda: now[0])
    pace = Pace(0.25, 3.0)
    assert pace.next() == 0.25
    now[0] += 10
    assert pace.next() == pytest.approx(1.0)
    now[0] += 1000
    assert pace.next() == 3.0
    pace.active()
    assert pace.next() == 0.25


def test_every_wait_is_a_number_of_seconds():
    found = {name: value for name, value in vars(waits).items() if name.isupper()}
    assert found and all(isinstance(value, float) and 0 < value < 3600 for value in found.values()), found
    assert waits.DEVICE_POLL < waits.DEVICE_IDLE_POLL and waits.TASK_POLL < waits.TASK_IDLE_POLL
    # a refusal gets out before its device ends, and is not asked again while it works
    assert waits.OFFER_SECONDS > waits.ASK_AGAIN_SECONDS > waits.GOODBYE_SECONDS
