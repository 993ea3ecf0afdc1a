"""Unequal ranks as numbers: cores in pieces, and means of them against a loop over whole matrices."""

from itertools import pairwise, product

import numpy as np
import pytest

from fedtune.adapters.describe import describe
from fedtune.adapters.ranks import Ranks, at_rank, join, places, ranks_of, split
from fedtune.aggregation.mean import weighted_mean
from fedtune.algorithms.base import State
from fedtune.errors import JobError, Refused
from fedtune.job import AdapterSection, parse_job
from fedtune.models.layout import Layout, Linear
from fedtune.round.algorithm import make_algorithm
from fedtune.types import TensorSpec, Update
from fedtune.wire import decode, encode, packet_bytes

LINEARS = (Linear("x.up", "up", 7, 6, "block.0"), Linear("x.down", "down", 6, 9, "block.1"))
LAYOUT = Layout(
    LINEARS,
    tuple(TensorSpec(f"{x.name}.weight", (x.outputs, x.inputs), x.unit) for x in LINEARS),
    (TensorSpec("head.bias", (3,), "head"),),
)
RANKS = (2, 3, 5)
CLASSES = 'simulation.devices=[{name = "a", rank = 2}, {name = "b", rank = 3}, {name = "c"}]'
SPEC = describe(LAYOUT, AdapterSection(rank=5))
MADE = Ranks(SPEC, RANKS)
CORES = tuple(f"{x.name}.R" for x in LINEARS)


def drawn(rank, rng):
    """What a client of this rank has."""
    return {t.name: rng.normal(size=t.shape).astype(np.float32) for t in at_rank(SPEC, rank).trainable}


@pytest.mark.parametrize("ranks", [(4,), (1, 2), (1, 2, 3, 4), (2, 7), (3, 4, 9), (16, 17)], ids=str)
def test_a_core_comes_back_from_its_pieces(ranks):
    core = np.arange(ranks[-1] ** 2, dtype=np.float32).reshape(ranks[-1], -1)
    pieces = split(core, ranks)
    assert [piece.size for piece in pieces] == np.diff([0, *(r * r for r in ranks)]).tolist()
    np.testing.assert_array_equal(pieces[0], core[: ranks[0], : ranks[0]])
    for inner, outer, piece in zip(ranks, ranks[1:], pieces[1:]):
        assert piece.tolist() == [
            core[i, j] for i, j in product(range(outer), repeat=2) if max(i, j) >= inner
        ]
    np.testing.assert_array_equal(join(pieces, ranks), core)
    for count, rank in enumerate(ranks, 1):
        np.testing.assert_array_equal(join(pieces[:count], ranks[:count]), core[:rank, :rank])
    assert sorted(places(ranks).tolist()) == list(range(ranks[-1] ** 2))


def test_what_a_client_has_is_nested():
    rng = np.random.default_rng(0)
    whole = drawn(5, rng)
    travelling = MADE.split(whole)
    assert {name: a.shape for name, a in travelling.items()} == {
        t.name: t.shape for t in MADE.schema.tensors
    } and MADE.schema.size == SPEC.size
    for rank in RANKS:
        part, held = MADE.leading(whole, rank), MADE.schema.held(rank)
        assert held.size == at_rank(SPEC, rank).size == 2 * rank**2 + 3
        assert [t.shape for t in at_rank(SPEC, rank).frame] == [(rank, 6), (7, rank), (rank, 9), (6, rank)]
        assert MADE.split(part).keys() == {t.name for t in held.tensors}
        found = MADE.join({t.name: travelling[t.name] for t in held.tensors}, rank)
        assert all(np.array_equal(found[name], part[name]) for name in whole) and found.keys() == whole.keys()
        filled = MADE.whole(part)
        for name in CORES:
            assert (
                filled[name].shape == (5, 5)
                and np.array_equal(filled[name][:rank, :rank], part[name])
                and np.count_nonzero(filled[name]) == rank * rank
            )
    assert (
        at_rank(SPEC, 0) is SPEC is at_rank(SPEC, 5)
        and at_rank(SPEC, 2).scale == SPEC.scale
        and MADE.join(travelling).keys() == whole.keys()
    )


@pytest.mark.parametrize("ranks", [(2, 3, 5), (2, 2, 3), (5, 2), (3,), (5, 5, 5, 2)], ids=str)
@pytest.mark.parametrize("equal", [True, False])
def test_the_mean_of_pieces_is_the_mean_of_each_number_over_its_owners(ranks, equal):
    rng = np.random.default_rng(len(ranks))
    before, clients, weights = (
        drawn(5, rng),
        [drawn(rank, rng) for rank in ranks],
        rng.uniform(1, 9, len(ranks)),
    )
    updates = [Update(str(i), 1, MADE.split(a), w) for i, (a, w) in enumerate(zip(clients, weights))]
    mean = MADE.join(weighted_mean(updates, MADE.split(before), equal=equal).arrays)
    for name in CORES:
        for i, j in product(range(5), repeat=2):
            owners = [k for k, rank in enumerate(ranks) if max(i, j) < rank]
            share = np.array([1.0 if equal else weights[k] for k in owners])
            expected = (
                share @ [clients[k][name][i, j] for k in owners] / share.sum()
                if owners
                else before[name][i, j]
            )
            assert mean[name][i, j] == pytest.approx(expected, rel=1e-6), (i, j)
            if not owners:
                assert mean[name][i, j] == before[name][i, j]


def test_the_product_with_the_mean_is_its_owners_mean_of_products_on_each_piece():
    """The owners of a ring are the clients of at least its rank:
    exact for any weights, whatever others hold.
    """
    rng = np.random.default_rng(3)
    ranks, weights = (2, 5, 3, 5), np.array([1.0, 2.0, 5.0, 7.0])
    clients = [drawn(rank, rng) for rank in ranks]
    updates = [Update(str(i), 1, MADE.split(a), w) for i, (a, w) in enumerate(zip(clients, weights))]
    mean = MADE.join(weighted_mean(updates, MADE.split(drawn(5, rng))).arrays)
    a, b = rng.normal(size=(5, 6)), rng.normal(size=(7, 5))
    for low, high in pairwise((0, *RANKS)):
        owners = [k for k, rank in enumerate(ranks) if rank >= high]
        share = weights[owners] / weights[owners].sum()
        # what clients of this rank have and those below have not
        ring = np.maximum.outer(np.arange(high), np.arange(high)) >= low
        products = [b[:, :high] @ (clients[k]["x.up.R"][:high, :high] * ring) @ a[:high] for k in owners]
        np.testing.assert_allclose(
            b[:, :high] @ (mean["x.up.R"][:high, :high] * ring) @ a[:high],
            np.tensordot(share, products, 1),
            atol=1e-5,
        )
    lone = weighted_mean(updates[:1], MADE.split(MADE.whole(clients[0]))).arrays
    np.testing.assert_allclose(
        b @ MADE.join(lone)["x.up.R"] @ a, b[:, :2] @ clients[0]["x.up.R"] @ a[:2], atol=1e-6
    )


def job(*changes):
    return parse_job("", ["adapter.rank=5", "data.clients=6", "federation.cohort=3", CLASSES, *changes])


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
def test_a_ring_that_nobody_trained_keeps_its_value_and_moments(optimizer):
    rng = np.random.default_rng(1)
    algorithm, before = (
        make_algorithm(job(f"federation.server-optimizer={optimizer}"), MADE.schema),
        MADE.split(drawn(5, rng)),
    )
    first, _ = algorithm.step(State(0, before), [Update("a", 1, MADE.split(drawn(5, rng)), 1.0)])
    second, _ = algorithm.step(first, [Update("b", 2, MADE.split(drawn(3, rng)), 1.0)])
    for t in MADE.schema.tensors:
        moved = t.rank < 5
        assert (
            np.array_equal(first.arrays[t.name], second.arrays[t.name]) != moved
            and (first.arrays[t.name] != before[t.name]).all()
        )
        assert np.array_equal(first.slots[f"first/{t.name}"], second.slots[f"first/{t.name}"]) != moved


def test_ranks_of_a_job():
    assert ranks_of(job()) == RANKS and ranks_of(parse_job("", ["adapter.rank=8"])) == (8,)
    assert ranks_of(job('simulation.devices=[{name = "a", rank = 5}, {name = "b"}]')) == (5,) and ranks_of(
        job('simulation.devices=[{name = "a", rank = 1}]')
    ) == (1, 5)


def model_packet(arrays, **more):
    return decode(encode("model", MADE.schema, arrays, round=1, **more), MADE.schema, kinds=["model"])


def test_a_packet_says_of_which_rank_it_is():
    whole = MADE.split(drawn(5, np.random.default_rng(0)))
    for rank, expected in ((2, 2), (3, 3), (5, 0)):
        held = {t.name: whole[t.name] for t in MADE.schema.held(rank).tensors}
        assert MADE.rank_of(model_packet(held)) == expected
        assert (
            len(encode("model", MADE.schema, held, round=1, frame="0" * 16, train=tuple(held)))
            == packet_bytes(MADE.schema, tuple(held), rank)[0]
        )
        assert MADE.trained(tuple(held), expected) is None
        assert MADE.trained(["x.down.R.2", *(f"x.down.R.{r}" for r in RANKS if 2 < r <= rank)], expected) == (
            "x.down.R",
        ) and MADE.trained(["head.bias"], expected) == ("head.bias",)
    gap = {name: a for name, a in whole.items() if not name.endswith(".3")}
    for wrong in (gap, {"x.up.R.2": whole["x.up.R.2"]}, {}):
        with pytest.raises(
            Refused,
            match=r"tensors: holds \d of 7 pieces of a model, which are those of none of the ranks 2, 3, 5",
        ):
            MADE.rank_of(model_packet(wrong))
    for names, rank in (
        (["x.up.R.2"], 3),
        (["x.up.R.3"], 3),
        (["x.up.R.2", "x.up.R.3"], 0),
        (["x.up.R.2", "x.up.R.3", "x.up.R.5"], 3),
    ):
        with pytest.raises(Refused, match="tensors: asks for a part of what a client of this rank has"):
            MADE.trained(names, rank)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            (CLASSES.replace("3", "9"),),
            (
                "simulation.devices.1.rank = 9: at most adapter.rank = 5, of which all classes train "
                "a leading part; lower it, or raise adapter.rank"
            ),
        ),
        (
            ("adapter.method=lora",),
            (
                'simulation.devices.0.rank = 2: adapter.method = "lora" has no cores with leading blocks; '
                'remove it, or use "fed-sb"'
            ),
        ),
        (
            (
                "privacy.unit=client",
                "privacy.noise-multiplier=3.0",
                "privacy.clip=0.5",
                "federation.weighting=equal",
            ),
            (
                'simulation.devices.0.rank = 2: adapter.rank is 5, and with privacy.unit = "client" all '
                "clients must train the same numbers; remove it"
            ),
        ),
        (("federation.aggregation=median",), 'and with federation.aggregation = "median" all clients must'),
        (("personal.method=ditto",), 'and with personal.method = "ditto" all clients must'),
        (
            ("federation.drift=fedspeed", "federation.proximal=0.1", "federation.optimizer=sgd"),
            'and with federation.drift = "fedspeed" all clients must',
        ),
        (
            ("edge.mode=forward", "federation.optimizer=sgd"),
            'and with edge.mode = "forward" all clients must',
        ),
        (
            ("privacy.secure-aggregation=true", "federation.weighting=equal", "privacy.update-clip=1.0"),
            "and with privacy.secure-aggregation = true all clients must",
        ),
    ],
)
def test_what_needs_equal_ranks_is_refused(changes, expected):
    with pytest.raises(JobError) as e:
        job(*changes)
    found = [line for line in e.value.problems if ".rank = " in line]
    assert expected in found[0] and all("\n" not in line for line in found)
    assert len(found) == (1 if "rank = 9" in expected else 2)
