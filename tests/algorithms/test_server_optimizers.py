"""Server optimizers against torch's SGD, against Reddi et al.'s Algorithm 2 written out in plain
Python, and in whole runs.
"""

import math

import numpy as np
import pytest
import torch

from fedtune.aggregation.steps import STEPS
from fedtune.algorithms import fed_avg
from fedtune.algorithms.base import State
from fedtune.algorithms.server_optimizers import moved, with_server_optimizer
from fedtune.errors import EmptyCohort, JobError
from fedtune.job import FederationSection, parse_job
from fedtune.types import ClientInfo, Update

START = {
    "a": np.array([[1.0, -2.0], [0.5, 3.0]], np.float32),
    "b": np.array([0.25], np.float32),
    "kept": np.array([7.0], np.float32),
}
CLIENTS = [ClientInfo("x", 10), ClientInfo("y", 30)]


def settings(**changes):
    return FederationSection(**changes)


def rounds(algorithm, count):
    """States of so many rounds in which two clients send what a draw says; nobody trains "kept"."""
    draw, state = np.random.default_rng(0), algorithm.init(START)
    for round in range(1, count + 1):
        updates = [
            Update(
                c.name,
                round,
                {
                    n: (state.arrays[n] + draw.normal(0, 0.1, a.shape)).astype(np.float32)
                    for n, a in START.items()
                    if n != "kept"
                },
                c.examples,
            )
            for c in CLIENTS
        ]
        before = state
        state, _ = algorithm.step(state, iter(updates))
        mean = {n: sum(u.weight * u.arrays[n].astype(np.float64) for u in updates) / 40 for n in ("a", "b")}
        yield before, mean, state


def made(**changes):
    return with_server_optimizer(fed_avg(seed=0, cohort=2, units=("block.0",)), settings(**changes))


def test_average_is_the_plain_algorithm():
    inner = fed_avg(seed=0, cohort=2, units=("block.0",))
    assert with_server_optimizer(inner, settings()) is inner


@pytest.mark.parametrize("lr, beta", [(1.0, 0.9), (0.3, 0.5), (1.0, 0.0)])
def test_fedavgm_is_torchs_sgd_with_momentum(lr, beta):
    parameters = {n: torch.nn.Parameter(torch.from_numpy(START[n].astype(np.float64))) for n in ("a", "b")}
    optimizer = torch.optim.SGD(parameters.values(), lr=lr, momentum=beta)
    for before, mean, after in rounds(
        made(server_optimizer="fedavgm", server_lr=lr, server_momentum=beta), 5
    ):
        for n, p in parameters.items():
            p.grad = torch.from_numpy(before.arrays[n] - mean[n])
        optimizer.step()
        for n, p in parameters.items():
            np.testing.assert_allclose(after.arrays[n], p.detach().numpy(), rtol=1e-5, atol=1e-6)
    if (lr, beta) == (1.0, 0.0):
        np.testing.assert_allclose(after.arrays["a"], mean["a"], rtol=1e-6)


def test_fedadam_is_algorithm_2():
    m, v, eta, beta, beta2, tau = 0.0, 0.0, 0.05, 0.8, 0.95, 0.01
    for before, mean, after in rounds(
        made(
            server_optimizer="fedadam",
            server_lr=eta,
            server_momentum=beta,
            server_beta2=beta2,
            server_tau=tau,
        ),
        6,
    ):
        delta = float(mean["a"][1, 0]) - float(before.arrays["a"][1, 0])
        m = beta * m + (1 - beta) * delta
        v = beta2 * v + (1 - beta2) * delta * delta
        assert float(after.arrays["a"][1, 0]) == pytest.approx(
            float(before.arrays["a"][1, 0]) + eta * m / (math.sqrt(v) + tau), rel=1e-6
        )


def test_what_a_round_does_not_move_stays_and_keeps_its_moments():
    for _, _, after in rounds(made(server_optimizer="fedadam"), 3):
        assert after.arrays["kept"].tobytes() == START["kept"].tobytes() and not any(
            n.endswith("/kept") for n in after.slots
        )
    still = moved(
        after,
        State(after.round + 1, after.arrays, after.slots),
        settings(server_optimizer="fedadam"),
        STEPS["fedadam"].change,
    )
    assert still.slots == after.slots and all(still.arrays[n] is after.arrays[n] for n in still.arrays)
    with pytest.raises(EmptyCohort):
        made(server_optimizer="fedavgm").step(after, iter(()))


@pytest.mark.parametrize(
    "changes",
    [
        ("federation.server-optimizer=fedadam", "federation.server-lr=0.01"),
        ("federation.server-optimizer=fedavgm", "federation.server-lr=0.7"),
        (
            "federation.server-optimizer=fedavgm",
            "federation.weighting=equal",
            "federation.cohort=3",
            "privacy.secure-aggregation=true",
            "privacy.clip=1.0",
            "privacy.noise=seeded",
        ),
        (
            "federation.server-optimizer=fedadam",
            "federation.weighting=equal",
            "privacy.unit=client",
            "privacy.clip=0.5",
            "privacy.noise-multiplier=2.0",
            "privacy.noise=seeded",
        ),
    ],
    ids=["fedadam", "fedavgm", "secure", "private"],
)
def test_a_resumed_run_has_its_moments(changes, tiny_job, run_rounds, tmp_path):
    from fedtune.workflows.simulate import Simulation

    job = tiny_job(*changes)
    whole = run_rounds(job, tmp_path / "whole").run.newest().state
    part = run_rounds(tiny_job(*changes), tmp_path / "part")
    newest = sorted((part.run.path / "checkpoints").glob("round-*"))
    assert any(name.startswith("first/") for name in whole.slots) and len(newest) >= 2
    newest[-1].unlink()
    Simulation(part.setup, part.run).rounds()
    again = part.run.newest().state
    assert all(again.arrays[n].tobytes() == whole.arrays[n].tobytes() for n in whole.arrays)
    assert all(again.slots[n].tobytes() == whole.slots[n].tobytes() for n in whole.slots)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            "federation.server-lr=0.1",
            (
                r'federation\.server-lr = 0\.1: only for server-optimizer = "fedavgm" or '
                r'"fedadam", not "average"; remove it'
            ),
        ),
        (
            "federation.server-beta2=0.5",
            r'federation\.server-beta2 = 0\.5: only for server-optimizer = "fedadam"',
        ),
    ],
)
def test_keys_without_their_optimizer_are_refused(change, message):
    with pytest.raises(JobError, match=message):
        parse_job("", [change])
