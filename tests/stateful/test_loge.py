"""FedLoGe against rounds written out with torch, each head a loss of its own on detached features; the
fixed head against what it should be; both realignments by hand.
"""

import numpy as np
import pytest
import torch
from plain_steps import SGD, Plain, near
from safetensors.numpy import load_file

from fedtune.stateful.base import Client
from fedtune.stateful.loge import answer, frame, personal, realigned, trainings
from fedtune.workflows.export import export_run
from fedtune.workflows.plan import make_plan

LOGE = ("personal.method=loge",)


def head_steps(plain, below, head, name, round):
    """Where plain SGD takes a head on the features of these values below it."""
    for n, p in plain.parameters.items():
        p.data = torch.from_numpy(np.array((below | head)[n], np.float32))
    weight, bias = (torch.from_numpy(head[n].copy()).requires_grad_() for n in ("head.weight", "head.bias"))
    kept, plain.model.forward = (
        plain.model.forward,
        lambda **inputs: plain.model.features(**inputs).detach() @ weight.T + bias,
    )
    try:
        for loss in plain.losses(name, round):
            for p, g in zip((weight, bias), torch.autograd.grad(loss(), (weight, bias))):
                p.data = p.data - plain.fed.lr * g
    finally:
        plain.model.forward = kept
    return {"head.weight": weight.detach().numpy(), "head.bias": bias.detach().numpy()}


def test_rounds_are_those_of_a_plain_loop(tiny_job, run_rounds, tmp_path):
    ran = run_rounds(
        tiny_job(*SGD, *LOGE, "federation.local-epochs=1", "federation.rounds=4"), tmp_path / "run"
    )
    plain = Plain(ran.setup.job)
    below, g = (
        {n: a for n, a in plain.first.items() if n.startswith("head.") == is_head}
        for is_head in (False, True)
    )
    fixed = {
        "head.weight": frame(*g["head.weight"].shape, plain.fed.seed),
        "head.bias": np.zeros(2, np.float32),
    }
    still = {n: np.full_like(a, not n.startswith("head.")) for n, a in plain.first.items()}
    own = {}
    for round in range(1, 5):
        names, sent = plain.cohort(round), []
        for name in names:
            ended, _ = plain.walk(below | fixed, name, round, moving=still)
            ended = {n: ended[n] for n in below}
            sent.append(ended | head_steps(plain, ended, g, name, round))
            own[name] = head_steps(plain, ended, own.get(name, g), name, round)
        w = plain.mean(sent, [plain.size(name) for name in names])
        below, g = {n: w[n] for n in below}, {n: w[n] for n in g}
    near(ran.run.newest().state.arrays, below | g)
    parts, line = plain.setup.split, ran.run.metrics()[-1]
    assert set(ran.kept.clients(ran.setup.split.clients, 4)) == set(own)
    right, everybody = (
        0,
        below
        | {
            "head.weight": np.stack([1.7 * row / np.sqrt((row**2).sum()) for row in g["head.weight"]]),
            "head.bias": g["head.bias"],
        },
    )
    for name, h in own.items():
        has = {int(label) for label in plain.setup.store.train(name).labels}
        near(ran.kept.load(name, 4), h | {"present": np.array([c in has for c in (0, 1)], np.float32)})
        weight = np.stack(
            [
                g["head.weight"][c] * np.sqrt((h["head.weight"][c] ** 2).sum()) + h["head.weight"][c]
                for c in (0, 1)
            ]
        )
        bias = np.array([g["head.bias"][c] + h["head.bias"][c] - (0 if c in has else 100) for c in (0, 1)])
        right += plain.right(
            below | {"head.weight": weight, "head.bias": bias}, parts.held_out[parts.clients.place(name)]
        )
    assert line["personal_accuracy"] == pytest.approx(right / line["personal_evaluated"])
    rows = parts.held_out.rows
    assert line["accuracy"] == pytest.approx(plain.right(everybody, rows) / len(rows))
    export_run(ran.run)
    near(
        {
            n: a
            for n, a in load_file(ran.run.path / "adapter" / "adapter.safetensors").items()
            if n in everybody
        },
        everybody,
    )


@pytest.mark.parametrize("classes, width", [(2, 32), (3, 32), (5, 64), (10, 384)])
def test_the_fixed_head_is_sparse_and_its_angles_are_equal(classes, width):
    e = frame(classes, width, 7).astype(np.float64)
    cosines = e @ e.T
    np.testing.assert_allclose(cosines, (classes * np.eye(classes) - 1) / (classes - 1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(e.sum(0), 0, atol=1e-5)  # what such rows do
    assert abs((e == 0).mean() - 0.6) < 0.5 / width + 0.01 and (e != 0).any(1).all()
    assert np.array_equal(frame(classes, width, 7), e) and not np.allclose(frame(classes, width, 8), e)


@pytest.mark.parametrize("classes, width", [(1, 4), (20, 4), (40, 16)])
def test_where_no_such_head_exists_it_is_a_head_all_the_same(classes, width):
    assert (
        np.isfinite(frame(classes, width, 0)).all()
        and (np.linalg.norm(frame(classes, width, 0), axis=1) <= 1.00001).all()
    )


def test_realigning_by_hand():
    model = {
        "a.R": np.ones((1, 1), np.float32),
        "head.weight": np.array([[3.0, 4.0], [0.0, 0.5], [0.0, 0.0]], np.float32),
        "head.bias": np.array([1.0, 2.0, 3.0], np.float32),
    }
    shared = realigned(model)
    near(shared, model | {"head.weight": np.array([[1.02, 1.36], [0.0, 1.7], [0.0, 0.0]], np.float32)}, 1e-6)
    kept = {
        "head.weight": np.array([[0.0, 2.0], [1.0, 0.0], [1.0, 1.0]], np.float32),
        "head.bias": np.array([0.5, 0.5, 0.5], np.float32),
        "present": np.array([1, 0, 1], np.float32),
    }
    near(
        personal(model, kept),
        model
        | {
            "head.weight": np.array([[6.0, 10.0], [1.0, 0.5], [1.0, 1.0]], np.float32),
            "head.bias": np.array([1.5, -97.5, 3.5], np.float32),
        },
        1e-6,
    )


def test_a_client_learns_three_times():
    model = {
        "a.R": np.ones((1, 1), np.float32),
        "head.weight": np.ones((3, 8), np.float32),
        "head.bias": np.ones(3, np.float32),
    }
    client = Client(model, None, 0, {}, np.array([2, 0, 2]))
    below, shared, own = trainings(client, 0, 0.5)
    assert (
        np.array_equal(below.start["head.weight"], frame(3, 8, 0))
        and not below.start["head.bias"].any()
        and below.pull.moving["a.R"].all()
        and not below.pull.moving["head.bias"].any()
    )
    assert (
        set(shared.start) == set(own.start) == {"head.weight", "head.bias"}
        and not own.pull.moving["a.R"].any()
        and own.pull.moving["head.weight"].all()
    )
    assert [ask.pull.strength for ask in (below, shared, own)] == [0.5, 0.5, 0.0]
    found = answer(
        client,
        [
            (below.start, {}),
            (model, {"loss": (1.0, 2.0)}),
            (model | {"head.bias": np.zeros(3, np.float32)}, {}),
        ],
    )
    assert (
        found.update is model
        and found.metrics == {"loss": (1.0, 2.0)}
        and found.kept["present"].tolist() == [1, 0, 1]
        and not found.kept["head.bias"].any()
    )


def test_messages_are_as_long_as_without(tiny_job):
    plain, ours = make_plan(tiny_job()), make_plan(tiny_job(*LOGE))
    assert (ours.update_bytes, ours.model_bytes, ours.frame_bytes) == (
        plain.update_bytes,
        plain.model_bytes,
        plain.frame_bytes,
    )
