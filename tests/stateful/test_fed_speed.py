"""FedSpeed against Algorithm 1 of the paper in its own letters (lambda and the prox-correction g),
with gradients taken uphill.
"""

import numpy as np
import torch
from plain_steps import SGD, Plain, near

MU, RHO = 0.5, 0.05


def test_rounds_are_those_of_algorithm_1(tiny_job, run_rounds, tmp_path):
    ran = run_rounds(
        tiny_job(
            *SGD,
            "federation.drift=fedspeed",
            f"federation.proximal={MU}",
            f"federation.ascent={RHO}",
            "federation.rounds=4",
        ),
        tmp_path / "run",
    )
    plain, lam = Plain(ran.setup.job), 1 / MU
    x, g = plain.first, {}
    for round in range(1, 5):
        names, sent = plain.cohort(round), []
        for name in names:
            before, at = (
                g.get(name, {n: np.zeros_like(a) for n, a in x.items()}),
                {n: torch.from_numpy(a) for n, a in x.items()},
            )
            end, _ = plain.walk(
                x,
                name,
                round,
                term=lambda n, p: (
                    ((p - at[n]) ** 2).sum() / (2 * lam)  # noqa: B023
                    - (torch.from_numpy(before[n]) * p).sum()  # noqa: B023
                ),
                uphill=RHO,
            )
            g[name] = {n: before[n] - (end[n] - x[n]) / lam for n in x}
            sent.append({n: end[n] - lam * g[name][n] for n in x})
        x = plain.mean(sent, [plain.size(name) for name in names])
    near(ran.run.newest().state.arrays, x, 3e-5)
    for name in ran.kept.clients(ran.setup.split.clients, 4):
        near({n: -a / lam for n, a in ran.kept.load(name, 4).items()}, g[name], 3e-5)


def test_uphill_matters_and_costs_no_bytes(tiny_job, run_rounds, tmp_path):
    found = {}
    for rho in (0.0, RHO):
        found[rho] = run_rounds(
            tiny_job(
                *SGD,
                "federation.drift=fedspeed",
                f"federation.proximal={MU}",
                f"federation.ascent={rho}",
                "federation.rounds=1",
            ),
            tmp_path / str(rho),
        ).run.newest()
    assert found[0.0].counters == found[RHO].counters and any(
        (found[0.0].state.arrays[n] != a).any() for n, a in found[RHO].state.arrays.items()
    )
