"""Who trains what: strategies against their enumeration, budgets, packets,
and rounds whose clients train different units.
"""

from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest

from fedtune.algorithms import State, dp_fed_avg, fed_avg
from fedtune.algorithms.units import (
    ROWS,
    Limits,
    budgets,
    by_common_scores,
    ever,
    lowest,
    most_numbers,
    require_budgets,
    round_bytes,
    selected,
    selecting,
    tensors_of,
    unlimited,
    within,
)
from fedtune.common.seeds import generator
from fedtune.errors import JobError
from fedtune.job import parse_job
from fedtune.privacy.client import ClientPrivacy
from fedtune.privacy.noise import SystemNoise
from fedtune.round.algorithm import make_algorithm
from fedtune.round.coordinator import start
from fedtune.round.replies import Reply
from fedtune.runs.folder import create_run
from fedtune.runs.ledger import Ledger
from fedtune.types import ClientInfo, TensorSpec, Update
from fedtune.units.strategies import STRATEGIES
from fedtune.wire import Schema, decode, encode, packet_bytes

SHAPES = {
    "emb.bias": ((2,), "outside"),
    **{f"{i}.R": ((i + 2, 3), f"block.{i}") for i in range(4)},
    "3.bias": ((3,), "block.3"),
    "head.bias": ((2,), "head"),
}
SCHEMA = Schema(tuple(TensorSpec(name, shape, unit) for name, (shape, unit) in SHAPES.items()))
BLOCKS = ("block.0", "block.1", "block.2", "block.3")
ALWAYS = {"outside", "head"}
FRAME = "0123456789abcdef"
CLIENTS = tuple(ClientInfo(f"c{i}", 10 * (i + 1)) for i in range(4))
CLASSES = 'simulation.devices=[{name = "a"}, {name = "b", units = 1}, {name = "c", units = 3}]'


def job(strategy, budget, *changes):
    return parse_job(
        "",
        [
            f"units.strategy={strategy}",
            f"units.budget={budget}",
            "data.clients=4",
            "federation.cohort=4",
            "federation.rounds=5",
            *changes,
        ],
    )


def test_without_a_budget_a_device_of_no_class_trains_all():
    """As live under units.fit, where a class may have a budget of its own."""
    fit = job("top", 0, "units.fit=true", 'simulation.devices=[{name = "a", units = 1, memory-mb = 500}]')
    assert selected(fit, SCHEMA, 1) == ever(fit, SCHEMA) == SCHEMA.units and selected(fit, SCHEMA, 1, 1) == (
        "outside",
        "block.3",
        "head",
    )
    limits = {"c0": Limits(), "c1": Limits(1)}
    algorithm = selecting(fed_avg(seed=0, cohort=2, units=SCHEMA.units), fit, SCHEMA, limits.__getitem__)
    state = algorithm.init({t.name: np.zeros(t.shape, np.float32) for t in SCHEMA.tensors})
    asked = {
        client: tensors_of(SCHEMA, selected(fit, SCHEMA, 1, its.blocks)) or [t.name for t in SCHEMA.tensors]
        for client, its in limits.items()
    }
    updates = [
        Update(
            client,
            1,
            {
                t.name: np.full(t.shape, float(place), np.float32)
                for t in SCHEMA.tensors
                if t.name in asked[client]
            },
            1.0,
        )
        for place, client in enumerate(limits, 1)
    ]
    after, _ = algorithm.step(state, updates)
    assert {name: float(a.flat[0]) for name, a in after.arrays.items()} == {
        t.name: 1.5 if t.unit in ("outside", "block.3", "head") else 1.0 for t in SCHEMA.tensors
    }


@pytest.mark.parametrize(
    "strategy, budget, expected",
    [
        *(("top", b, BLOCKS[4 - b :]) for b in (1, 2, 3, 4)),
        *(("bottom", b, BLOCKS[:b]) for b in (1, 2, 3, 4)),
        ("both", 1, BLOCKS[3:]),
        ("both", 2, ("block.0", "block.3")),
        ("both", 3, ("block.0", "block.2", "block.3")),
        ("both", 4, BLOCKS),
    ],
)
def test_strategies_take_what_they_say(strategy, budget, expected):
    for round in (1, 2, 7):
        found = selected(job(strategy, budget), SCHEMA, round)
        assert found == tuple(u for u in SCHEMA.units if u in {*expected, *ALWAYS})
    assert ever(job(strategy, budget), SCHEMA) == lowest(job(strategy, budget), SCHEMA) == found


@pytest.mark.parametrize("count", range(1, 8))
def test_both_takes_the_last_and_the_first_in_turn(count):
    units = tuple(f"block.{i}" for i in range(count))
    left, expected = list(units), []
    while left:
        expected += [left.pop(), *([left.pop(0)] if left else [])]
    assert STRATEGIES["both"].order(units, 0, 1) == tuple(expected)


def test_lisa_draws_each_order_as_often_as_any_by_round_and_seed_alone():
    drawn = Counter(STRATEGIES["lisa"].order(BLOCKS[:3], 0, round) for round in range(1, 1201))
    assert set(drawn) == set(permutations(BLOCKS[:3])) and all(
        abs(n - 200) < 5 * np.sqrt(200) for n in drawn.values()
    )
    assert STRATEGIES["lisa"].order(BLOCKS, 5, 3) == tuple(
        BLOCKS[i] for i in generator(5, "units", 3).permutation(4)
    )
    orders = [[STRATEGIES["lisa"].order(BLOCKS, seed, r) for r in range(9)] for seed in (0, 1)]
    assert orders[0] != orders[1]
    for round in range(1, 20):
        found = [set(selected(job("lisa", 2), SCHEMA, round, budget)) for budget in (1, 0, 3, 4)]
        assert all(one < more for one, more in pairwise(found)) and [len(f - ALWAYS) for f in found] == [
            1,
            2,
            3,
            4,
        ]
    assert ever(job("lisa", 1), SCHEMA) == SCHEMA.units and set(lowest(job("lisa", 1), SCHEMA)) == {
        "block.0",
        *ALWAYS,
    }


def test_what_is_trained_at_all_counts_the_largest_budget():
    assert budgets(job("top", 2, CLASSES)) == (2, 1, 3)
    assert set(ever(job("top", 2, CLASSES), SCHEMA)) == {*BLOCKS[1:], *ALWAYS} and set(
        ever(job("bottom", 2), SCHEMA)
    ) == {*BLOCKS[:2], *ALWAYS}
    assert most_numbers(job("top", 1), SCHEMA) == most_numbers(job("lisa", 1), SCHEMA) == 2 + 18 + 2
    assert (
        most_numbers(job("bottom", 1), SCHEMA) == 2 + 6 + 2
        and most_numbers(parse_job("", ()), SCHEMA) == SCHEMA.size
    )


def test_all_is_all_and_nothing_around_it():
    plain = parse_job("", ())
    assert (
        selected(plain, SCHEMA, 1) == ever(plain, SCHEMA) == lowest(plain, SCHEMA) == SCHEMA.units
        and tensors_of(SCHEMA, SCHEMA.units) is None
    )
    made = fed_avg(seed=0, cohort=2, units=SCHEMA.units)
    assert selecting(made, plain, SCHEMA) is made


@pytest.mark.parametrize(
    "changes, schema, lines",
    [
        (("top", 5), SCHEMA, ["units.budget = 5: 4 blocks of this base have trained tensors; lower it"]),
        (
            ("lisa", 4, 'simulation.devices=[{name = "a"}, {name = "b", units = 9}]'),
            SCHEMA,
            ["simulation.devices.1.units = 9: 4 blocks of this base have trained tensors; lower it"],
        ),
        (
            ("fisher", 1, 'simulation.devices=[{name = "a", depth = 5}]'),
            SCHEMA,
            ["simulation.devices.0.depth = 5: 4 blocks of this base have trained tensors; lower it"],
        ),
        (
            ("fisher", 1, 'simulation.devices=[{name = "a", depth = 3}, {name = "b", depth = 2}]'),
            SCHEMA,
            [
                'units.strategy = "fisher": a probe takes the backward pass through all 4 blocks, '
                "and no class of simulation.devices can go deeper than 3; give one more memory-mb, "
                'units.seconds or depth, or use "top" or "lisa"'
            ],
        ),
        (
            ("bottom", 1),
            Schema(SCHEMA.tensors[-1:]),
            [
                (
                    'units.strategy = "bottom": this base has no blocks in which adapter.method = "fed-sb" '
                    'trains anything; use "all"'
                )
            ],
        ),
    ],
)
def test_a_budget_beyond_the_blocks_is_an_error(changes, schema, lines):
    with pytest.raises(JobError) as e:
        require_budgets(job(*changes), schema)
    assert list(e.value.problems) == lines
    with pytest.raises(JobError):
        make_algorithm(job(*changes), schema)


def test_a_depth_leaves_the_upper_blocks():
    made = job("gradient", 2, 'simulation.devices=[{name = "a"}, {name = "b", units = 1, depth = 3}]')
    assert [within(SCHEMA, depth) for depth in (0, 1, 3, 4, 9)] == [
        BLOCKS,
        BLOCKS[3:],
        BLOCKS[1:],
        BLOCKS,
        BLOCKS,
    ]
    assert [unlimited(SCHEMA, depth) for depth in (0, 1, 3, 4)] == [True, False, False, True]
    assert [
        set(lowest(made, SCHEMA, Limits(budget, depth))) - ALWAYS
        for budget, depth in ((0, 0), (1, 0), (2, 3), (1, 1))
    ] == [set(BLOCKS[:2]), {BLOCKS[0]}, set(BLOCKS[1:3]), {BLOCKS[3]}]
    assert [most_numbers(made, SCHEMA, Limits(1, depth)) for depth in (0, 3)] == [22, 22] and most_numbers(
        made, SCHEMA, Limits(2, 1)
    ) == 22
    wider = Schema((TensorSpec("0.R", (9, 9), "block.0"), TensorSpec("1.R", (2, 2), "block.1")))
    assert [most_numbers(job("gradient", 1), wider, Limits(1, depth)) for depth in (0, 1)] == [
        81,
        4,
    ] and round_bytes(job("gradient", 1), wider, 3, Limits(1, 1)) == [packet_bytes(wider, ("1.R",))] * 3
    state = State(0, model(), {ROWS: np.array([[0.4, 0.3, 0.2, 0.1]])})
    assert [
        set(by_common_scores(made, SCHEMA, state, Limits(budget, depth))) - ALWAYS
        for budget, depth in ((0, 0), (2, 3), (2, 1))
    ] == [set(BLOCKS[:2]), set(BLOCKS[1:3]), {BLOCKS[3]}]


def test_bytes_of_rounds_are_those_of_their_packets():
    arrays = model()
    for strategy in ("all", "top", "lisa"):
        made = job(strategy, 0 if strategy == "all" else 1)
        for round, (down, up) in enumerate(round_bytes(made, SCHEMA, 6), 1):
            names = tensors_of(SCHEMA, selected(made, SCHEMA, round))
            part = arrays if names is None else {n: arrays[n] for n in names}
            assert down == len(encode("model", SCHEMA, arrays, round=round, frame=FRAME, train=names))
            assert up == len(
                encode(
                    "update",
                    SCHEMA,
                    part,
                    round=round,
                    frame=FRAME,
                    weight=2.0,
                    metrics={"loss": (1.5, 3.0), "accuracy": (1.0, 3.0)},
                )
            )
    # blocks here have different sizes
    assert len({up for _, up in round_bytes(job("lisa", 1), SCHEMA, 6)}) > 1
    assert len(round_bytes(job("top", 1), SCHEMA, 0)) == 1


def model(seed=0):
    rng = np.random.default_rng(seed)
    return {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in SCHEMA.tensors}


def coordinator(tmp_path, made, budget=lambda client: 0):
    run = create_run(tmp_path / "run", made, {})
    found = start(
        made,
        run,
        SCHEMA,
        FRAME,
        0,
        make_algorithm(made, SCHEMA, lambda client: Limits(budget(client))),
        CLIENTS,
        model,
        lambda round, arrays: None,
    )
    found.begin()
    return found


def test_a_round_whose_clients_train_different_units_is_the_mean_by_hand(tmp_path):
    """Budgets 1, 2, 1, 4 from the bottom; c3 is not heard."""
    own = {"c0": 1, "c1": 2, "c2": 1, "c3": 4}
    made = coordinator(tmp_path, job("bottom", 2, CLASSES), own.__getitem__)
    pairs = dict(made.plan())
    values, replies, sent = {}, [], {}
    for place, (client, packet) in enumerate(pairs.items()):
        asked = decode(packet, SCHEMA, kinds=["model"], round=1, frame=FRAME)
        assert list(asked.arrays) == list(SHAPES) and all(
            np.array_equal(asked.arrays[n], a) for n, a in model().items()
        )
        trained = {n for n, (_, unit) in SHAPES.items() if unit in {*BLOCKS[: own[client]], *ALWAYS}}
        assert set(asked.train if asked.train is not None else SHAPES) == trained
        values[client] = {n: a for n, a in model(place + 1).items() if n in trained}
        sent[client] = encode(
            "update", SCHEMA, values[client], round=1, frame=FRAME, weight=10.0 * (place + 1)
        )
        replies += [] if client == "c3" else [Reply(client, sent[client])]
    report = made.finish(replies)
    assert report.clients == ("c0", "c1", "c2") and report.refused == {"c3": "no reply"}
    weights = {"c0": 10.0, "c1": 20.0, "c2": 30.0}
    for name, before in model().items():
        owners = [c for c in weights if name in values[c]]
        if not owners:
            np.testing.assert_array_equal(made.state.arrays[name], before)
            continue
        exact = sum(weights[c] * values[c][name].astype(np.float64) for c in owners) / sum(
            weights[c] for c in owners
        )
        np.testing.assert_allclose(made.state.arrays[name], exact, rtol=1e-6, atol=1e-7)
    assert list(made.state.arrays) == list(SHAPES)
    assert made.traffic.up == {c: len(sent[c]) for c in weights} and made.traffic.down == {
        c: len(p) for c, p in pairs.items()
    }
    line = made.run.metrics()[-1]
    assert (
        line["units"] == {"outside": 3, "block.0": 3, "block.1": 1, "head": 3}
        and made.run.metrics()[0]["units"] == {}
    )
    (event,) = Ledger(made.run.ledger).events()
    assert event.facts["clients"] == 4


@pytest.mark.parametrize(
    "names, said",
    [
        (list(SHAPES), "7 of 7 tensors; 3, from emb.bias to head.bias, were assigned"),
        (["head.bias"], "1 of 7 tensors; 3, from"),
        (["emb.bias", "1.R", "head.bias"], "3 of 7 tensors; 3, from"),
        (["emb.bias", "0.R"], "2 of 7 tensors; 3, from"),
    ],
)
def test_any_other_set_of_tensors_is_refused(names, said, tmp_path):
    made = coordinator(tmp_path, job("bottom", 1))
    right = encode(
        "update",
        SCHEMA,
        {n: model(1)[n] for n in ("emb.bias", "0.R", "head.bias")},
        round=1,
        frame=FRAME,
        weight=1.0,
    )
    made.plan()
    report = made.finish(
        [
            Reply(
                "c0",
                encode("update", SCHEMA, {n: model(9)[n] for n in names}, round=1, frame=FRAME, weight=1.0),
            ),
            Reply("c1", right),
        ]
    )
    assert report.clients == ("c1",) and report.refused["c0"].startswith(f"tensors: {said}")
    np.testing.assert_array_equal(made.state.arrays["0.R"], model(1)["0.R"])
    np.testing.assert_array_equal(made.state.arrays["1.R"], model()["1.R"])


def test_the_norm_of_a_part_is_looked_at(tmp_path):
    made = coordinator(tmp_path, job("bottom", 1, "federation.max-norm=3.0"))
    near, far = (
        {n: model()[n] + np.float32(by) for n in ("emb.bias", "0.R", "head.bias")} for by in (0.1, 2.0)
    )
    made.plan()
    report = made.finish(
        [
            Reply(c, encode("update", SCHEMA, a, round=1, frame=FRAME, weight=1.0))
            for c, a in (("c0", near), ("c1", far))
        ]
    )
    assert report.clients == ("c0",) and report.refused["c1"].startswith("norm: 6.325 from the model")


def test_noise_for_clients_is_on_what_the_round_trains_and_the_denominator_stays():
    made, schema = (
        job("lisa", 1),
        Schema(tuple(TensorSpec(f"{i}.w", (100, 50), f"block.{i}") for i in range(3))),
    )
    privacy = ClientPrivacy(clip=1.0, multiplier=2.0)
    algorithm = selecting(
        dp_fed_avg(
            seed=0,
            cohort=4,
            units=schema.units,
            sampling="fixed",
            privacy=privacy,
            noise=lambda round: SystemNoise(),
            secret=False,
        ),
        made,
        schema,
    )
    state = algorithm.init({t.name: np.zeros(t.shape, np.float32) for t in schema.tensors})
    for round in range(1, 6):
        (assigned,) = {a.units for a in algorithm.plan(state, CLIENTS)}
        (name,) = tensors_of(schema, assigned)
        # of norm 0.7; two of four came
        updates = [
            Update(f"c{i}", round, {name: state.arrays[name] + np.float32(0.01)}, 1.0) for i in range(2)
        ]
        after, report = algorithm.step(state, updates)
        assert report.weight == 4.0 and after.slots.keys() == state.slots.keys()
        for other in state.arrays.keys() - {name}:
            assert after.arrays[other] is state.arrays[other]
        moved = after.arrays[name] - state.arrays[name]
        assert moved.std() == pytest.approx(2.0 / 4, rel=0.05) and moved.mean() == pytest.approx(
            2 * 0.01 / 4, abs=5 * 0.5 / np.sqrt(moved.size)
        )
        state = after


def test_noise_for_clients_of_unequal_budgets_is_on_all_that_anybody_trains():
    """What a client does not train counts as no difference, a client's whole update is clipped at once,
    and the sum is divided by the cohort whoever trained a block.
    """
    made = job(
        "top",
        2,
        CLASSES,
        "privacy.unit=client",
        "privacy.noise-multiplier=2.0",
        "privacy.clip=1.0",
        "federation.weighting=equal",
    )
    schema = Schema(tuple(TensorSpec(f"{i}.w", (100, 50), f"block.{i}") for i in range(4)))
    blocks = {"c0": 1, "c1": 3, "c2": 2, "c3": 1}
    privacy = ClientPrivacy(clip=1.0, multiplier=2.0)
    algorithm = selecting(
        dp_fed_avg(
            seed=0,
            cohort=4,
            units=schema.units,
            sampling="fixed",
            privacy=privacy,
            noise=lambda round: SystemNoise(),
            secret=False,
        ),
        made,
        schema,
        lambda client: Limits(blocks[client]),
    )
    state = algorithm.init({t.name: np.zeros(t.shape, np.float32) for t in schema.tensors})
    assert {a.client: len(a.units) for a in algorithm.plan(state, CLIENTS)} == blocks
    # c2 does not answer
    updates = [
        Update(c, 1, {f"{i}.w": np.full((100, 50), 0.01, np.float32) for i in range(4 - blocks[c], 4)}, 1.0)
        for c in ("c0", "c1", "c3")
    ]
    after, _ = algorithm.step(state, updates)
    assert after.arrays["0.w"] is state.arrays["0.w"]  # nobody trains it
    length = {c: 0.01 * np.sqrt(5000 * b) for c, b in blocks.items()}
    for i, trained in ((1, ["c1"]), (2, ["c1"]), (3, ["c0", "c1", "c3"])):
        moved = after.arrays[f"{i}.w"]
        mean = sum(0.01 * min(1, 1.0 / length[c]) for c in trained) / 4
        assert moved.std() == pytest.approx(2.0 / 4, rel=0.05) and moved.mean() == pytest.approx(
            mean, abs=5 * 0.5 / np.sqrt(moved.size)
        )
    assert length["c1"] > 1 > length["c0"]


@pytest.mark.parametrize(
    "privacy",
    [
        (),
        (
            "privacy.unit=client",
            "privacy.noise-multiplier=1.0",
            "privacy.clip=1.0",
            "federation.weighting=equal",
            "privacy.noise=seeded",
        ),
    ],
    ids=["plain", "client"],
)
def test_moments_of_what_a_round_does_not_train_stay(privacy):
    """Momentum of each unit is that of its own rounds."""
    made = job("lisa", 1, "federation.server-optimizer=fedavgm", "federation.server-momentum=0.5", *privacy)
    algorithm, seen = make_algorithm(made, SCHEMA), {n: np.zeros(s) for n, (s, _) in SHAPES.items()}
    state = algorithm.init(model())
    for round in range(1, 10):
        (units,) = {a.units for a in algorithm.plan(state, CLIENTS)}
        names = {t.name for t in SCHEMA.of_units(units)}
        updates = [
            Update(c.name, round, {n: state.arrays[n] + np.float32(0.01) for n in names}, 1.0)
            for c in CLIENTS
        ]
        after, _ = algorithm.step(state, updates)
        for name in SHAPES:
            if name not in names:
                assert after.arrays[name] is state.arrays[name]
                np.testing.assert_array_equal(after.slots.get(f"first/{name}", 0.0), seen[name])
                continue
            first = after.slots[f"first/{name}"]
            if not privacy:
                np.testing.assert_allclose(first, 0.5 * seen[name] + 0.01, rtol=1e-4)
            np.testing.assert_allclose(after.arrays[name], state.arrays[name] + first, rtol=1e-5, atol=1e-6)
            seen[name] = first
        state = after
    assert len({f"first/{n}" for n in SHAPES} & state.slots.keys()) >= 5 and ("clip" in state.slots) == bool(
        privacy
    )


def test_blocks_are_those_of_the_schema_from_the_bottom_up():
    assert SCHEMA.blocks == BLOCKS and Schema(SCHEMA.tensors[:1]).blocks == ()
