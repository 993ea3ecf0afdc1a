"""Robust averages: their definitions written out one number at a time, and three kinds of attack on real
data that break the plain mean.
"""

import itertools
from functools import partial

import numpy as np
import pytest

from fedtune.aggregation import robust
from fedtune.aggregation.mean import weighted_mean
from fedtune.errors import EmptyCohort, JobError, ShapeMismatch
from fedtune.job import parse_job
from fedtune.types import Update

REFERENCE = {"w": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)}


def drawn(count, seed=0, names=("w", "b")):
    rng = np.random.default_rng(seed)
    return [
        Update(
            f"c{i}",
            1,
            {n: rng.normal(size=REFERENCE[n].shape).astype(np.float32) for n in names},
            float(i + 1),
            {"loss": (1.0, 1.0)},
        )
        for i in range(count)
    ]


def by_number(updates, name, rule):
    stacked = np.stack([u.arrays[name].astype(np.float64) for u in updates])
    return np.array(
        [rule(stacked[(slice(None), *place)].tolist()) for place in np.ndindex(REFERENCE[name].shape)]
    ).reshape(REFERENCE[name].shape)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_the_median_of_each_number(count):
    updates = drawn(count)
    found = robust.median(iter(updates), REFERENCE)

    def middle(values):
        ordered = sorted(values)
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    for name in REFERENCE:
        np.testing.assert_allclose(found.arrays[name], by_number(updates, name, middle), rtol=1e-6, atol=1e-7)
    assert (
        found.clients == tuple(u.client for u in updates)
        and found.weight == count
        and found.metrics == {"loss": (count, count)}
    )


@pytest.mark.parametrize(
    "count, share, cut", [(10, 0.2, 2), (10, 0.29, 2), (5, 0.1, 1), (3, 0.4, 1), (2, 0.4, 0), (1, 0.4, 0)]
)
def test_the_trimmed_mean_of_each_number(count, share, cut):
    updates = drawn(count)
    found = robust.trimmed_mean(iter(updates), REFERENCE, share)

    def trimmed(values):
        kept = sorted(values)[cut : len(values) - cut]
        return sum(kept) / len(kept)

    for name in REFERENCE:
        np.testing.assert_allclose(
            found.arrays[name], by_number(updates, name, trimmed), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("count, wrong", [(7, 2), (9, 3), (5, 1), (4, 3), (2, 1), (1, 5)])
def test_krum_takes_the_update_nearest_to_most(count, wrong):
    updates = drawn(count, seed=count)
    flat = [
        np.concatenate([(u.arrays[n].astype(np.float64) - REFERENCE[n]).ravel() for n in REFERENCE])
        for u in updates
    ]
    f = max(0, min(wrong, (count - 3) // 2))
    scores = []
    for i in range(count):
        apart = sorted(float(((flat[i] - flat[j]) ** 2).sum()) for j in range(count) if j != i)
        scores.append(sum(apart[: max(1, count - f - 2)]))
    order = sorted(range(count), key=lambda i: scores[i])
    one, several = (
        robust.krum(iter(updates), REFERENCE, wrong),
        robust.krum(iter(updates), REFERENCE, wrong, several=True),
    )
    kept = sorted(order[: max(1, count - f)])
    assert one.clients == (updates[order[0]].client,) and several.clients == tuple(
        updates[i].client for i in kept
    )
    for name in REFERENCE:
        np.testing.assert_allclose(one.arrays[name], updates[order[0]].arrays[name], rtol=1e-6)
        np.testing.assert_allclose(
            several.arrays[name],
            np.mean([updates[i].arrays[name] for i in kept], axis=0),
            rtol=1e-5,
            atol=1e-6,
        )


def test_long_updates_are_cut_to_the_bound():
    short, long = drawn(2)
    long.arrays["w"][:] = 1000.0
    found = robust.norm_bound([short, long], REFERENCE, 1.5)
    expected = {n: np.zeros(a.shape) for n, a in REFERENCE.items()}
    for update in (short, long):
        size = np.sqrt(
            sum(((update.arrays[n].astype(np.float64) - REFERENCE[n]) ** 2).sum() for n in REFERENCE)
        )
        for n in REFERENCE:
            expected[n] += (update.arrays[n] - REFERENCE[n]) * min(1.0, 1.5 / size) / 2
    for n in REFERENCE:
        np.testing.assert_allclose(found.arrays[n], REFERENCE[n] + expected[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        robust.median,
        partial(robust.trimmed_mean, share=0.2),
        partial(robust.krum, wrong=1, several=True),
        partial(robust.norm_bound, bound=1e9),
    ],
)
def test_a_tensor_counts_those_who_hold_it_and_stays_where_nobody_does(rule):
    found = rule(drawn(5, names=("w",)), REFERENCE)
    assert np.array_equal(found.arrays["b"], REFERENCE["b"]) and not np.array_equal(
        found.arrays["w"], REFERENCE["w"]
    )
    both = robust.median([*drawn(3, names=("w",)), *drawn(1, seed=9, names=("b",))], REFERENCE)
    np.testing.assert_allclose(both.arrays["b"], drawn(1, seed=9, names=("b",))[0].arrays["b"], rtol=1e-6)
    with pytest.raises(EmptyCohort):
        rule(iter(()), REFERENCE)
    with pytest.raises(ShapeMismatch, match=r"client 'x', tensor 'w': shape \(3,\), the model has \(2, 3\)"):
        rule([Update("x", 1, {"w": np.zeros(3, np.float32)}, 1.0)], REFERENCE)


def softmax_regression(arrays, x, labels, steps=10, lr=0.5):
    """A client's plain gradient steps, float32 out."""
    w, b = (arrays[n].astype(np.float64) for n in ("w", "b"))
    for _ in range(steps):
        raised = np.exp((z := x @ w + b) - z.max(1, keepdims=True))
        error = raised / raised.sum(1, keepdims=True)
        error[np.arange(len(labels)), labels] -= 1
        w, b = w - lr * x.T @ error / len(labels), b - lr * error.mean(0)
    return {"w": w.astype(np.float32), "b": b.astype(np.float32)}


def honest(arrays, trained, rng):
    return trained


def flipped(arrays, trained, rng):
    return {n: (arrays[n] - 4 * (a - arrays[n])).astype(np.float32) for n, a in trained.items()}


def huge(arrays, trained, rng):
    return {n: (arrays[n] + rng.normal(0, 10, a.shape)).astype(np.float32) for n, a in trained.items()}


def boosted(arrays, trained, rng):
    return {n: (arrays[n] + 5 * (a - arrays[n])).astype(np.float32) for n, a in trained.items()}


RULES = {
    "median": robust.median,
    "trimmed-mean": partial(robust.trimmed_mean, share=0.3),
    "krum": partial(robust.krum, wrong=3),
    "multi-krum": partial(robust.krum, wrong=3, several=True),
    "norm-bound": partial(robust.norm_bound, bound=1.0),
}
ATTACKS = {"sign-flip": (flipped, 0), "scaled": (huge, 0), "label-flip, scaled": (boosted, 1)}


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's digits: ten clients' shares and held-out images."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, labels = x[order] / 16, labels[order]
    return list(zip(np.array_split(x[:1300], 10), np.array_split(labels[:1300], 10))), x[1300:], labels[1300:]


def accuracy(digits, rule, attack=honest, shift=0, wrong=3, rounds=12):
    """After rounds in which `wrong` of the ten clients send what the attack makes of their training, with
    labels moved by `shift`.
    """
    clients, x, labels = digits
    arrays, rng = (
        {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)},
        np.random.default_rng(0),
    )
    for round in range(1, rounds + 1):
        updates = []
        for i, (own, truth) in enumerate(clients):
            bad = i < wrong
            trained = softmax_regression(arrays, own, (truth + shift) % 10 if bad else truth)
            updates.append(
                Update(str(i), round, attack(arrays, trained, rng) if bad else trained, float(len(own)))
            )
        arrays = rule(updates, arrays).arrays
    return float(((x @ arrays["w"] + arrays["b"]).argmax(1) == labels).mean())


@pytest.mark.parametrize("name, attack", itertools.product(RULES, ATTACKS))
def test_three_wrong_clients_of_ten_break_the_mean_and_not_the_rule(name, attack, digits):
    how, shift = ATTACKS[attack]
    undisturbed = accuracy(digits, weighted_mean)
    assert undisturbed > 0.9
    assert accuracy(digits, weighted_mean, how, shift) < 0.5
    assert accuracy(digits, RULES[name], how, shift) > undisturbed - 0.06


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum", "norm-bound"])
def test_a_run_uses_its_rule(rule, tiny_job, run_rounds, tmp_path):
    keys = {"trimmed-mean": ["federation.trim=0.2"], "norm-bound": ["federation.norm-bound=0.01"]}.get(
        rule, ["federation.byzantine=1"] if "krum" in rule else []
    )
    run = run_rounds(
        tiny_job(f"federation.aggregation={rule}", *keys, "federation.rounds=1", "federation.cohort=6"),
        tmp_path / "run",
    ).run
    plain = run_rounds(tiny_job("federation.rounds=1", "federation.cohort=6"), tmp_path / "plain").run
    ours, theirs = run.newest().state.arrays, plain.newest().state.arrays
    assert any(not np.array_equal(ours[n], theirs[n]) for n in ours) and len(
        run.metrics()[-1]["clients"]
    ) == {"krum": 1, "multi-krum": 5}.get(rule, 6)
    aside = run.metrics()[-1]["refused"]
    assert len(aside) == 6 - len(run.metrics()[-1]["clients"]) and set(aside.values()) <= {
        "aggregation: too far from the others, left out"
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        (["federation.aggregation=krum"], r'federation\.byzantine = 0: aggregation = "krum" needs it'),
        (
            ["federation.aggregation=krum", "federation.byzantine=3", "federation.cohort=8"],
            (
                r"federation\.byzantine = 3: krum needs more than 2 f \+ 2 updates, and federation\.cohort = "
                r"8; lower it to 2, or raise cohort"
            ),
        ),
        (
            ["federation.trim=0.1"],
            r'federation\.trim = 0\.1: only for aggregation = "trimmed-mean", not "mean"; remove it',
        ),
        (["federation.aggregation=norm-bound"], r"federation\.norm-bound = 0: .* needs it"),
        (
            [
                "federation.aggregation=median",
                "privacy.unit=client",
                "privacy.clip=1",
                "privacy.epsilon=3",
                "federation.weighting=equal",
            ],
            r"noise for whole clients is sized for a mean",
        ),
        (
            [
                "federation.aggregation=median",
                "privacy.secure-aggregation=true",
                "privacy.clip=1",
                "federation.weighting=equal",
            ],
            r"looks at single updates, which secure-aggregation hides",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(JobError, match=message):
        parse_job("", changes)
