"""FedSelect against rounds written out with masks on gradients, the entry-wise mean against loops, and
what becomes personal against sorting.
"""

from math import floor, nextafter

import numpy as np
import pytest
from plain_steps import SGD, Plain, near

from fedtune.errors import EmptyCohort, ShapeMismatch
from fedtune.round.algorithm import make_algorithm
from fedtune.stateful.base import Client
from fedtune.stateful.select import answer, held_mean, promoted, sent, trainings
from fedtune.types import TensorSpec, Update
from fedtune.wire import Schema
from fedtune.workflows.plan import make_plan

SHARE, MOST, EVERY = 0.4, 0.7, 2
SELECT = (
    "personal.method=select",
    f"personal.share={SHARE}",
    f"personal.most={MOST}",
    f"personal.every={EVERY}",
)


def grown(mask, moved):
    """By sorting a list of entries, one after another."""
    places = sorted((p for p in np.ndindex(mask.shape) if not mask[p]), key=lambda p: -moved[p])
    after, wanted = mask.copy(), -(-round(len(places) * SHARE * 10) // 10)
    for p in places[:wanted]:
        if after.sum() + 1 <= MOST * after.size:
            after[p] = 1
    return after


def test_rounds_are_those_of_a_plain_loop(tiny_job, run_rounds, tmp_path):
    ran = run_rounds(
        tiny_job(
            *SGD,
            *SELECT,
            "federation.local-epochs=1",
            "data.alpha=0.7",
            "federation.cohort=4",
            "federation.rounds=5",
        ),
        tmp_path / "run",
    )
    plain = Plain(ran.setup.job)
    w, none = plain.first, {n: np.zeros_like(a) for n, a in plain.first.items()}
    own, masks, marks, joined = {}, {}, {}, {}
    for round in range(1, 6):
        held, names = {n: [] for n in w}, plain.cohort(round)
        for name in names:
            m = masks.get(name, none)
            start = {n: (1 - m[n]) * a + m[n] * own.get(name, w)[n] for n, a in w.items()}
            first, _ = plain.walk(start, name, round, "personal", moving=m)
            end, _ = plain.walk(first, name, round, moving={n: 1 - a for n, a in m.items()})
            for n in w:
                held[n].append((plain.size(name), end[n], m[n] == 0))
            marks.setdefault(name, w)
            own[name], joined[name] = end, joined.get(name, 0) + 1
            if joined[name] % EVERY == 0:
                moved = {n: np.abs(end[n] - marks[name][n]) for n in w}
                masks[name], marks[name] = (
                    {n: grown(m[n], moved[n]) if not n.endswith("bias") else m[n] for n in w},
                    end,
                )
        w = {n: a.copy() for n, a in w.items()}
        for n, a in w.items():
            for p in np.ndindex(a.shape):
                votes = [(weight, values[p]) for weight, values, its in held[n] if its[p]]
                if votes:
                    a[p] = sum(weight * float(v) for weight, v in votes) / sum(weight for weight, _ in votes)
    near(ran.run.newest().state.arrays, w, 2e-5)
    assert (
        set(ran.kept.clients(ran.setup.split.clients, 5)) == set(own)
        and max(joined.values()) >= 4
        and len({plain.size(name) for name in own}) > 1
    ), [plain.size(name) for name in own]
    for name in own:
        found, m = ran.kept.load(name, 5), masks.get(name, none)
        for n in w:
            if n.endswith("bias"):
                assert n not in found
            else:
                near(
                    {n: found[n], "mark": found[f"mark.{n}"]}, {n: own[name][n], "mark": marks[name][n]}, 2e-5
                )
                assert np.array_equal(found[f"mask.{n}"], m[n])
        assert found["rounds"] == joined[name]
    parts, line = plain.setup.split, ran.run.metrics()[-1]
    right = sum(
        plain.right(
            {n: np.where(masks.get(name, none)[n] > 0, own[name][n], a) for n, a in w.items()},
            parts.held_out[parts.clients.place(name)],
        )
        for name in own
    )
    assert line["personal_accuracy"] == pytest.approx(right / line["personal_evaluated"]) and line[
        "personal_clients"
    ] == len(own)


def test_each_entry_is_the_mean_of_those_that_hold_it():
    draw = np.random.default_rng(0)
    reference = {
        "a.R": draw.normal(0, 1, (4, 3)).astype(np.float32),
        "b.bias": np.array([0.0, -2.0, 1e-42], np.float32),
    }
    weights, updates, masks = [3.0, 1.0, 8.0], [], []
    for k, weight in enumerate(weights):
        mask = {"a.R": (draw.random((4, 3)) < 0.5).astype(np.float32), "b.bias": np.zeros(3, np.float32)}
        mask["a.R"][1, 1], mask["a.R"][2, 2] = 1, k != 1  # nobody, and one alone
        ended = {n: (a + draw.normal(0, 0.1, a.shape)).astype(np.float32) for n, a in reference.items()}
        # training left them as they were
        ended["a.R"][0, 0], ended["b.bias"] = reference["a.R"][0, 0], reference["b.bias"].copy()
        mask["a.R"][0, 0] = k == 2
        updates.append(
            Update(
                f"c{k}",
                1,
                {n: sent(a, ended[n], mask[n]) for n, a in reference.items()},
                weight,
                {"loss": (weight, 1.0)},
            )
        )
        masks.append((mask, ended))
    for equal in (False, True):
        mean = held_mean(iter(updates), reference, equal)
        for n, a in reference.items():
            for p in np.ndindex(a.shape):
                votes = [
                    (1.0 if equal else weight, ended[n][p])
                    for weight, (mask, ended) in zip(weights, masks)
                    if not mask[n][p]
                ]
                expected = sum(w * float(v) for w, v in votes) / sum(w for w, _ in votes) if votes else a[p]
                assert (
                    mean.arrays[n][p] == pytest.approx(expected, rel=3e-7, abs=2e-38)
                    and mean.arrays[n].dtype == np.float32
                )
        assert (
            mean.arrays["a.R"][1, 1] == reference["a.R"][1, 1]
            and mean.arrays["a.R"][2, 2] == updates[1].arrays["a.R"][2, 2]
        )
        assert (
            mean.clients == ("c0", "c1", "c2")
            and mean.weight == (3.0 if equal else 12.0)
            and mean.metrics == {"loss": (12.0, 3.0)}
        )
    with pytest.raises(EmptyCohort):
        held_mean([], reference)
    with pytest.raises(EmptyCohort):
        held_mean([Update("c", 1, reference, 0.0)], reference)
    with pytest.raises(ShapeMismatch, match="'c', tensor 'a\\.R'"):
        held_mean([Update("c", 1, {"a.R": np.zeros((1, 1), np.float32)}, 1.0)], reference)


def test_what_travels_says_what_is_held():
    start = np.array([0.0, 1.5, -2.0, 1e-40, 3.0, 1.1754944e-38], np.float32)
    trained = np.array([0.0, 1.5, -2.0, 1e-40, 4.0, 1.1754944e-38], np.float32)
    everything = sent(start, trained, np.zeros(6, np.float32))
    assert (
        (everything != start).all()
        and np.abs(everything - trained).max() < 3e-7
        and everything.dtype == np.float32
    )
    assert everything[4] == 4 and float(everything[1]) > 1.5 > nextafter(1.5, 0.0)
    some = sent(start, trained + 1, np.array([1, 0, 1, 0, 1, 0], np.float32))
    assert ((some == start) == [True, False, True, False, True, False]).all()


@pytest.mark.parametrize(
    "share, most", [(0.25, 0.8), (0.3, 0.29), (1.0, 0.5), (0.1, 1.0), (0.5, 0.0), (0.9, 0.95)]
)
def test_never_more_than_most_becomes_personal(share, most):
    draw = np.random.default_rng(1)
    for shape in ((4, 4), (10, 10), (1, 3), (100,)):
        mask = np.zeros(shape, np.float32)
        for _ in range(30):
            moved = draw.random(shape)
            after = promoted(mask, moved, share, most)
            new = (after > 0) & (mask == 0)
            assert (
                (after >= mask).all()
                and after.sum() <= most * after.size + 1e-9
                and new.sum() <= np.ceil(share * (mask == 0).sum())
            )
            assert not new.any() or (after == 1).all() or moved[new].min() >= moved[after == 0].max()
            mask = after
        assert mask.sum() == floor(most * mask.size + 1e-9)  # and in the end as many
    assert promoted(np.zeros(4), np.array([1.0, 2.0, 2.0, 2.0]), 0.5, 1.0).tolist() == [0, 1, 1, 0]


def test_a_client_without_steps_moves_nothing():
    model = {"a.R": np.ones((2, 2), np.float32), "head.bias": np.zeros(2, np.float32)}
    client = Client(model, None, 0, {})
    (ask,) = trainings(client)  # nothing is its own yet
    assert ask.start is model and all(moves.all() for moves in ask.pull.moving.values())
    found = answer(client, [(model, {"loss": (0.0, 0.0)})], 0.5, 0.8, 3)
    assert (
        held_mean([Update("c", 1, found.update, 2.0)], model).arrays["a.R"] == pytest.approx(1.0, abs=2e-7)
        and not found.kept["mask.a.R"].any()
    )


def test_messages_are_as_long_as_without_and_rounds_too_small_leave_the_model(tiny_job, run_rounds, tmp_path):
    plain, ours = make_plan(tiny_job()), make_plan(tiny_job(*SELECT))
    assert (ours.update_bytes, ours.model_bytes, ours.frame_bytes) == (
        plain.update_bytes,
        plain.model_bytes,
        plain.frame_bytes,
    )
    assert (
        ours.device["adapter_gradients_optimizer"]
        == plain.device["adapter_gradients_optimizer"] + 7 * 4 * plain.trainable
    )
    ran = run_rounds(
        tiny_job(
            *SELECT,
            "federation.rounds=1",
            "federation.min-replies=2",
            'simulation.devices=[{name = "gone", drop-out = 1.0}]',
        ),
        tmp_path / "run",
    )
    first = ran.run.first_arrays()
    assert not ran.run.metrics()[-1]["clients"] and all(
        np.array_equal(first[n], a) for n, a in ran.run.newest().state.arrays.items()
    )


def test_what_is_sent_when_entries_become_personal():
    """They are averaged a last time; from the next round on nothing of them travels,
    whatever training makes of them.
    """
    model = {"a.R": np.zeros((1, 4), np.float32)}
    ended = {"a.R": np.array([[4.0, 1.0, 3.0, 2.0]], np.float32)}
    first = answer(Client(model, None, 1, {}), [(model, {}), (ended, {})], 0.5, 0.5, 1)
    assert first.update["a.R"].tolist() == ended["a.R"].tolist() and first.kept["mask.a.R"].tolist() == [
        [1, 0, 1, 0]
    ]
    second = answer(
        Client(model, first.kept, 1, {}), [(model, {}), ({"a.R": ended["a.R"] * 9}, {})], 0.5, 0.5, 1
    )
    assert second.update["a.R"].tolist() == [[0, 9, 0, 18]] and second.kept["a.R"].tolist() == [
        [36, 9, 27, 18]
    ]


def test_too_few_rounds_for_entries_of_their_own_are_told(tiny_job):
    few = make_plan(tiny_job("personal.method=select", "federation.rounds=8"))  # of 6 clients 2 a round
    assert [note for note in few.notes if "personal.every" in note] == [
        (
            "personal.every = 3: a client is expected to take part in 2.7 rounds, so that most would never "
            "have entries of their own; lower it, or give more rounds"
        )
    ]
    assert not any(
        "personal.every" in note
        for job in (tiny_job("personal.method=select", "federation.rounds=9"), tiny_job())
        for note in make_plan(job).notes
    )


def test_the_coordinator_uses_that_mean(tiny_job):
    schema = Schema((TensorSpec("a.R", (1, 2), "block.0"),))
    algorithm = make_algorithm(tiny_job(*SELECT, "federation.weighting=equal"), schema)
    state = algorithm.init({"a.R": np.zeros((1, 2), np.float32)})
    after, _ = algorithm.step(
        state,
        [
            Update("x", 1, {"a.R": np.array([[0.0, 2.0]], np.float32)}, 1.0),
            Update("y", 1, {"a.R": np.array([[4.0, 4.0]], np.float32)}, 9.0),
        ],
    )
    assert after.arrays["a.R"].tolist() == [[4.0, 3.0]] and after.round == 1
