"""Device classes: times in closed form, chances within their bounds, and draws that depend on seed,
round and client alone.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.algorithms.fed_avg import draw_cohort
from fedtune.common.seeds import generator
from fedtune.job import DeviceClass, FederationSection
from fedtune.round.batches import local_batches
from fedtune.simulation.devices import (
    Chosen,
    Span,
    able,
    assign,
    available,
    drops_out,
    examples_run,
    round_seconds,
    span,
)
from fedtune.types import ClientInfo

PHONE = DeviceClass(
    name="phone", share=3.0, speed=4.0, up_kbps=1000.0, down_kbps=8000.0, available=0.3, drop_out=0.2
)
LAPTOP = DeviceClass(name="laptop", memory_mb=500)
CLIENTS = 100_000


def within(found: int, draws: int, chance: float) -> bool:
    """Within 5 standard deviations of a binomial: a right draw fails this once in two million seeds,
    and seeds are fixed here.
    """
    return abs(found - draws * chance) <= 5 * (draws * chance * (1 - chance)) ** 0.5


def test_a_device_is_busy_for_bytes_over_bandwidth_and_examples_over_speed():
    # 16 Mbit at 8 Mbit/s; 1 Mbit at 1
    assert span(PHONE, down=2_000_000, examples=20, up=125_000) == Span(down=2.0, train=5.0, up=1.0)
    assert span(PHONE, 2_000_000, 20, 125_000).total == 8.0
    assert span(LAPTOP, 2_000_000, 20, 125_000).total == 0.0


def test_a_round_lasts_as_its_slowest_answer_or_until_the_deadline():
    assert round_seconds([3.0, 8.0, 1.0], waited=False, deadline=60.0) == 8.0
    assert round_seconds([3.0], waited=True, deadline=60.0) == 60.0
    assert round_seconds([], waited=False, deadline=60.0) == 0.0


@given(
    examples=st.integers(1, 60),
    steps=st.integers(0, 9),
    epochs=st.integers(1, 3),
    batch=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_examples_are_counted_as_the_steps_see_them(examples, steps, epochs, batch, seed):
    settings = FederationSection(local_steps=steps, local_epochs=epochs, batch_size=batch, seed=seed)
    lengths = np.random.default_rng(seed).integers(1, 50, examples).tolist()
    seen = local_batches(lengths, batch, epochs, steps, generator(seed, "local", 7, "c"))
    assert examples_run(examples, settings, 7, "c") == sum(len(index) for index in seen)


def test_classes_are_dealt_by_share_and_stay_when_clients_are_added():
    classes = assign(0, (PHONE, LAPTOP), CLIENTS)
    assert within(int((classes == 0).sum()), CLIENTS, 0.75)
    assert set(classes.tolist()) == {0, 1}
    np.testing.assert_array_equal(assign(0, (PHONE, LAPTOP), 500), classes[:500])
    assert (assign(1, (PHONE, LAPTOP), CLIENTS) != classes).any()
    assert not assign(0, (PHONE,), 50).any()


@pytest.mark.parametrize(
    "step, expected", [(500_000_000, [True, True]), (500_000_001, [True, False]), (None, [True, False])]
)
def test_a_class_needs_the_memory_of_a_step(step, expected):
    assert able((PHONE, LAPTOP), [step, step]).tolist() == expected


def test_each_class_needs_the_memory_of_its_own_step():
    assert able((PHONE, LAPTOP, LAPTOP), [10**12, 500_000_000, 500_000_001]).tolist() == [True, True, False]


def test_who_can_be_drawn_follows_the_chance_of_the_class():
    classes = assign(0, (PHONE, LAPTOP), CLIENTS)
    places = available(0, 5, (PHONE, LAPTOP), classes, np.array([True, True]))
    found, of = np.bincount(classes[places]), np.bincount(classes)
    assert within(found[0], of[0], 0.3) and found[1] == of[1] and (np.diff(places) > 0).all()
    np.testing.assert_array_equal(places, available(0, 5, (PHONE, LAPTOP), classes, np.array([True, True])))
    other = available(0, 6, (PHONE, LAPTOP), classes, np.array([True, True]))
    both = np.intersect1d(places[classes[places] == 0], other)
    assert within(len(both), of[0], 0.09)  # rounds are independent
    assert set(classes[available(0, 5, (PHONE, LAPTOP), classes, np.array([True, False]))].tolist()) == {0}


def test_drop_outs_are_as_frequent_as_said_in_any_order():
    asked = [(round, f"c{i}") for round in range(1, 41) for i in range(100)]
    lost = {pair for pair in asked if drops_out(0, *pair, PHONE)}
    assert within(len(lost), len(asked), 0.2)
    assert lost == {pair for pair in reversed(asked) if drops_out(0, *pair, PHONE)}
    assert not any(drops_out(0, *pair, LAPTOP) for pair in asked)
    assert all(drops_out(0, *pair, DeviceClass(name="brick", drop_out=1.0)) for pair in asked)


class Counted(Sequence):
    """A population that counts how many of its clients were looked at."""

    def __init__(self) -> None:
        self.looked = 0

    def __len__(self) -> int:
        return CLIENTS

    def __getitem__(self, at: int) -> ClientInfo:
        self.looked += 1
        return ClientInfo(f"c{at}", 3)


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_drawing_a_few_of_many_looks_at_no_others(sampling):
    clients, places = Counted(), np.arange(1, CLIENTS, 2)
    drawn = draw_cohort(Chosen(clients, places), 50, sampling, generator(0, "cohort", 1))
    assert clients.looked == len(drawn) and all(int(c.name[1:]) % 2 for c in drawn)
    assert len(drawn) == 50 or (sampling == "poisson" and within(len(drawn), len(places), 50 / len(places)))
    assert len(Chosen(clients, places)[10:20]) == 10 and Chosen(clients, places)[-1].name == f"c{CLIENTS - 1}"
