"""SCAFFOLD, option II, against Algorithm 1 written out: the model,
the common control and those of the clients.
"""

import numpy as np
import torch
from plain_steps import SGD, Plain, near

from fedtune.stateful.base import Client
from fedtune.stateful.scaffold import answer, trainings
from fedtune.workflows.plan import make_plan

SCAFFOLD = ("federation.drift=scaffold", "federation.weighting=equal")


def test_rounds_are_those_of_algorithm_1(tiny_job, run_rounds, tmp_path):
    ran = run_rounds(
        tiny_job(*SGD, *SCAFFOLD, "federation.rounds=4", "federation.lr-decay=0.9"), tmp_path / "run"
    )
    plain = Plain(ran.setup.job)
    x, c = plain.first, {n: np.zeros_like(a) for n, a in plain.first.items()}
    own, everybody = {name: dict(c) for name in plain.setup.split.clients}, len(plain.setup.split.clients)
    for round in range(1, 5):
        ys, changes, names, rate = [], [], plain.cohort(round), plain.fed.lr * 0.9 ** (round - 1)
        for name in names:
            correction = {n: torch.from_numpy(c[n] - own[name][n]) for n in x}
            y, steps = plain.walk(x, name, round, term=lambda n, p: (correction[n] * p).sum())  # noqa: B023
            after = {n: own[name][n] - c[n] + (x[n] - y[n]) / (steps * rate) for n in x}
            changes.append({n: after[n] - own[name][n] for n in x})
            ys.append(y)
            own[name] = after
        x = {n: np.mean([y[n] for y in ys], 0) for n in x}
        c = {n: c[n] + sum(change[n] for change in changes) / everybody for n in x}
    near(ran.run.newest().state.arrays, x | {f"control.{n}": a for n, a in c.items()}, 2e-5)
    for name in ran.kept.clients(ran.setup.split.clients, 4):
        near(ran.kept.load(name, 4), own[name], 2e-5)
    assert max(np.abs(a).max() for a in c.values()) > 1e-3 and "personal_clients" not in ran.run.metrics()[-1]


def test_messages_are_twice_as_long(tiny_job, run_rounds, tmp_path):
    plain, twice = make_plan(tiny_job()), make_plan(tiny_job("federation.optimizer=sgd", *SCAFFOLD))
    # the header's steps
    assert (
        abs(twice.update_bytes - plain.update_bytes - 4 * plain.trainable) <= 256
        and twice.trainable == plain.trainable
    )
    run = run_rounds(tiny_job("federation.optimizer=sgd", *SCAFFOLD), tmp_path / "run").run
    assert run.metrics()[-1]["up"] == 3 * 2 * twice.update_bytes


def test_a_client_without_steps_changes_nothing():
    model = {"a": np.ones(2, np.float32), "control.a": np.full(2, 0.5, np.float32)}
    client = Client(model, None, 0, {"a": 0.1})
    (ask,) = trainings(client)
    found = answer(client, [(ask.start, {})])
    assert np.array_equal(found.update["control.a"], model["control.a"]) and not found.kept["a"].any()


def test_the_common_control_is_the_mean_of_all_also_after_void_rounds(tiny_job, run_rounds, tmp_path):
    """Rounds with fewer than three of four clients leave the model as it is,
    and its clients have moved their controls.
    """
    ran = run_rounds(
        tiny_job(
            *SGD,
            *SCAFFOLD,
            "federation.rounds=8",
            "federation.cohort=4",
            "federation.min-replies=4",
            'simulation.devices=[{name = "shaky", drop-out = 0.2}]',
        ),
        tmp_path / "run",
    )
    assert 2 <= sum(not line["clients"] for line in ran.run.metrics()[1:]) <= 7
    kept = [ran.kept.load(name, 8) for name in ran.kept.clients(ran.setup.split.clients, 8)]
    for name, array in ran.run.newest().state.arrays.items():
        if name.startswith("control."):
            np.testing.assert_allclose(
                array, sum(own[name.removeprefix("control.")] for own in kept) / 6, rtol=0, atol=1e-6
            )
