"""Dealing out: what must hold for every scheme, by random cases; then each scheme's own shape and errors."""

import re

import numpy as np
import pytest
import slow_partition
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.examples import Dataset, Examples, load_dataset
from fedtune.data.holdings import describe
from fedtune.data.partition import Split, split
from fedtune.data.slices import Names, Slices
from fedtune.errors import DataError
from fedtune.job import DataSection, ModelSection

SCHEMES = ("iid", "dirichlet", "shards", "natural")


def examples(labels, groups=(), natural=()) -> Examples:
    names = tuple(str(row) for row in range(len(labels)))
    return Examples(names, np.array(labels, dtype=np.int64), names, tuple(natural), tuple(groups))


def section(**keys) -> DataSection:
    return DataSection(**{"partition": "iid", "clients": 4, **keys})


@st.composite
def cases(draw):
    """Random examples with or without groups, and a section that asks for no more than they can give."""
    scheme = draw(st.sampled_from(SCHEMES))
    count = draw(st.integers(4, 40))
    rows = draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=3 * count))
    rows = sorted(set(range(count)) | set(rows)) + rows  # every group has a row
    grouped = draw(st.booleans())
    of_group = [draw(st.integers(0, 2)) for _ in range(count)] if scheme == "natural" else [0] * count
    values = [of_group[row] for row in rows]
    labels = [draw(st.integers(0, 3)) for _ in rows]
    natural = [f"v{value}" for value in values] if scheme == "natural" else ()
    made = examples(labels, [f"g{row}" for row in rows] if grouped else (), natural)
    return made, _section(draw, scheme, made, of_group)


def _section(draw, scheme, made, of_group) -> DataSection:
    alpha = draw(st.sampled_from((0.01, 1.0, 100.0) if scheme != "natural" else (0.0, 0.1, 5.0)))
    shared = {"partition": scheme, "alpha": alpha, "held_out": draw(st.sampled_from((0.05, 0.3, 0.8)))}
    if scheme == "natural":
        smallest = min(of_group.count(value) for value in set(of_group))
        return section(**shared, clients=len(set(of_group)) * draw(st.integers(0, smallest)))
    shards = draw(st.integers(1, 2)) if scheme == "shards" else 1
    room = len(set(made.groups) or made.ids) // shards
    return section(**shared, shards=shards, clients=draw(st.integers(1, room)))


def same(left: Split, right: Split) -> bool:
    return left.clients == right.clients and all(
        np.array_equal(a, b)
        for one, other in ((left.train, right.train), (left.held_out, right.held_out))
        for a, b in zip(one, other)
    )


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 2**63 - 1))
def test_what_every_split_keeps(case, seed):
    made, data = case
    found = split(made, data, seed)
    sides = [*found.train, *found.held_out]

    assert len(found.clients) == len(found.train) == len(found.held_out) == len(set(found.clients))
    assert not data.clients or len(found.clients) == data.clients
    assert sorted(np.concatenate(sides).tolist()) == list(range(len(made)))  # exactly a partition
    assert all(side.dtype == np.int64 and np.all(np.diff(side) > 0) for side in sides)
    assert all(len(train) for train in found.train)
    if made.groups:
        homes = [{made.groups[row] for row in side} for side in sides]
        assert sum(map(len, homes)) == len(set(made.groups))  # no group on two sides or at two clients
    if data.partition == "natural":
        assert all(
            len({made.natural[row] for row in (*train, *held)}) == 1
            for train, held in zip(found.train, found.held_out)
        )
    for train, held in zip(found.train, found.held_out):
        keys = made.groups or made.ids
        groups, kept = len({keys[row] for row in (*train, *held)}), len({keys[row] for row in held})
        assert kept == min(max(1, round(data.held_out * groups)), groups - 1)
    assert same(found, split(made, data, seed))


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 2**63 - 1))
def test_the_slow_obvious_way_deals_the_same(case, seed):
    made, data = case
    found = split(made, data, seed)
    assert [
        (train.tolist(), held.tolist()) for train, held in zip(found.train, found.held_out)
    ] == slow_partition.split(made, data, seed)


@pytest.mark.parametrize(
    "keys",
    [
        {"partition": "iid", "clients": 900},
        {"partition": "dirichlet", "clients": 900, "alpha": 0.05},
        {"partition": "shards", "clients": 900},
        {"partition": "natural", "clients": 0},
        {"partition": "natural", "clients": 1000, "alpha": 0.1},
        {"partition": "natural", "clients": 1000, "alpha": 0.0},
    ],
    ids=str,
)
def test_many_clients_are_dealt_as_the_slow_way_does(keys):
    rng = np.random.default_rng(0)
    made = examples(rng.integers(0, 7, 6000), natural=[f"user {row % 500}" for row in range(6000)])
    found = split(made, section(**keys), 3)
    assert [
        (train.tolist(), held.tolist()) for train, held in zip(found.train, found.held_out)
    ] == slow_partition.split(made, section(**keys), 3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_deals_differently(scheme):
    made = examples([row % 3 for row in range(200)], natural=[f"v{row % 2}" for row in range(200)])
    data = section(partition=scheme)
    assert not same(split(made, data, 1), split(made, data, 2))


def test_iid_is_even():
    found = split(examples([0] * 103), section(clients=10, held_out=0.2), 0)
    assert sorted(len(t) + len(h) for t, h in zip(found.train, found.held_out)) == [10] * 7 + [11] * 3
    assert all(len(held) == 2 for held in found.held_out)
    assert found.clients[:2] == ("client-000", "client-001")


def test_small_alpha_skews_labels_and_large_does_not():
    made = examples([row % 4 for row in range(4000)])

    def most_common_share(alpha: float) -> float:
        found = split(made, section(partition="dirichlet", alpha=alpha, clients=20), 0)
        return float(np.mean([np.bincount(made.labels[train]).max() / len(train) for train in found.train]))

    assert most_common_share(0.05) > 0.7
    assert most_common_share(1000.0) < 0.35


def test_a_very_small_alpha_still_gives_every_client_a_row():
    found = split(examples([0] * 50 + [1] * 50), section(partition="dirichlet", alpha=1e-6, clients=100), 0)
    assert all(len(train) == 1 for train in found.train)


def test_shards_bound_the_labels_of_a_client():
    made = examples([row % 10 for row in range(1000)])
    found = split(made, section(partition="shards", shards=2, clients=50), 0)
    assert all(len(np.unique(made.labels[train])) <= 2 for train in found.train)
    assert {len(t) + len(h) for t, h in zip(found.train, found.held_out)} == {20}


def test_label_schemes_use_the_label_most_rows_of_a_group_have():
    # two groups a client: with one label shard each, "a" groups (majority 0) never
    # meet "b" groups (majority 1)
    groups = [f"a{n // 3}" for n in range(12)] + [f"b{n // 3}" for n in range(12)]
    labels = [0, 0, 1] * 4 + [1, 1, 0] * 4
    found = split(examples(labels, groups), section(partition="shards", shards=1, clients=4), 3)
    for train, held in zip(found.train, found.held_out):
        assert len({groups[row][0] for row in (*train, *held)}) == 1


def test_natural_one_client_per_value():
    found = split(examples([0] * 9, natural=["b", "a", "c"] * 3), section(partition="natural", clients=0), 0)
    assert found.clients == ("a", "b", "c")
    assert sorted((*found.train[0], *found.held_out[0])) == [1, 4, 7]


def test_natural_sizes():
    made = examples([0] * 200, natural=["x", "y"] * 100)
    even = split(made, section(partition="natural", clients=10, alpha=0.0), 0)
    assert even.clients[:2] == ("x-00", "x-01")
    assert {len(t) + len(h) for t, h in zip(even.train, even.held_out)} == {20}
    uneven = split(made, section(partition="natural", clients=10, alpha=0.5), 0)
    assert len({len(t) + len(h) for t, h in zip(uneven.train, uneven.held_out)}) > 3


def test_natural_values_become_names_that_files_can_have():
    found = split(
        examples([0] * 6, natural=["a/b", "a b", "../"] * 2), section(partition="natural", clients=3), 0
    )
    assert len(set(found.clients)) == 3
    assert all(re.fullmatch(r"[\w-]+", name) for name in found.clients)


def test_the_held_out_groups_do_not_depend_on_row_order():
    groups = [f"g{n}" for n in range(30)]
    one, other = examples([0] * 30, groups), examples([0] * 30, groups[::-1])
    held = [
        {made.groups[row] for row in split(made, section(clients=1), 5).held_out[0]} for made in (one, other)
    ]
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("made", "keys", "message"),
    [
        (
            examples([0, 1, 0]),
            {},
            "data.clients = 4: each needs one, the data has 3 rows; at most 3 clients can be had",
        ),
        (
            examples([0] * 6, ["a", "b", "c"] * 2),
            {},
            "data.clients = 4: each needs one, the data has 3 groups; at most 3 clients can be had",
        ),
        (
            examples([0] * 7),
            {"partition": "shards"},
            (
                "data.shards = 2: 4 clients with 2 shards each need 8, the data has 7 rows; "
                "at most 1 shard each can be had"
            ),
        ),
        (
            examples([0] * 3),
            {"partition": "shards", "shards": 1000},
            "data.clients = 4: each needs one, the data has 3 rows; at most 3 clients can be had",
        ),
        (
            examples([0]),
            {},
            "data.clients = 4: each needs one, the data has 1 row; at most 1 client can be had",
        ),
        (examples([0] * 3), {"partition": "dirichlet"}, "at most 3 clients can be had"),
        (
            examples([0] * 6, natural=["x", "y", "z"] * 2),
            {"partition": "natural"},
            (
                "data.clients = 4: 'domain' has 3 values (x, y, z); give a multiple of 3, "
                "or 0 for one client per value"
            ),
        ),
        (
            examples([0] * 6, natural=["x"] * 5 + ["y"]),
            {"partition": "natural"},
            "data.clients = 4: domain 'y' has 1 row for its 2 clients; at most 2 clients can be had",
        ),
        (
            examples([0] * 4, ["g", "g", "h", "i"], ["x", "y", "x", "y"]),
            {"partition": "natural"},
            "group 'g' has rows of domain 'x' and 'y'; a group stays with one client",
        ),
        (
            examples([0] * 4),
            {"partition": "natural"},
            "data.by = 'domain': these examples have no such column",
        ),
    ],
)
def test_what_cannot_be_dealt_is_one_clear_line(made, keys, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        split(made, section(**keys), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (Names(("a", "b-01", "c")), ("a", "b-01", "c")),
        (Names(("client",), 3, 3), ("client-000", "client-001", "client-002")),
        (Names(("x", "x-00"), 2), ("x-00", "x-01", "x-00-00", "x-00-01")),
    ],
)
def test_names_are_made_and_found_by_place(names, expected):
    assert names == expected == tuple(names) and names[-1] == expected[-1] and names[1:] == expected[1:]
    assert [names.place(name) for name in expected] == list(range(len(expected)))
    for wrong in ("", "d", "client-3", "client-0000", "client-003", "x-1", "x-02", "x--1", "-01"):
        with pytest.raises(KeyError):
            names.place(wrong)


def test_names_widen_with_their_number():
    names = Names(("client",), 100_000, 3)
    assert (names[7], names[99_999], names.place("client-00042")) == ("client-00007", "client-99999", 42)


def test_slices_are_views_of_one_array():
    parts = [np.array([4, 1]), np.array([], dtype=np.int64), np.array([0])]
    found = Slices.of(parts)
    assert [part.tolist() for part in found] == [[4, 1], [], [0]] and found.sizes.tolist() == [2, 0, 1]
    assert found[-1].base is found.rows and [len(part) for part in found[:2]] == [2, 0]
    with pytest.raises(IndexError):
        found[3]


def test_describe():
    made = examples([0, 0, 1, 1], natural=["x", "x", "y", "y"])
    found = Split(
        Names(("p", "q")),
        Slices.of([np.array([0, 2]), np.array([3])]),
        Slices.of([np.array([1]), np.array([])]),
    )
    assert describe(found, Dataset(made, ("no", "yes", "maybe"), "here")) == [
        {"name": "p", "natural": "", "train": 2, "held_out": 1, "labels": [1, 1, 0]},
        {"name": "q", "natural": "y", "train": 1, "held_out": 0, "labels": [0, 1, 0]},
    ]


def test_the_default_job(vader_folder):
    data = DataSection()
    dataset = load_dataset(data, ModelSection(), 0)
    rows = describe(split(dataset.examples, data, 0), dataset)
    assert len(rows) == 24
    assert sum(row["train"] + row["held_out"] for row in rows) == 9387
    assert {row["natural"] for row in rows} == {"tweets", "amazon", "nyt"}
