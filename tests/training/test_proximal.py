"""FedProx: the step is that of the loss with its term written out,
in every engine and on devices without torch.
"""

import numpy as np
import pytest
import torch

from fedtune.adapters import methods
from fedtune.bundles.bundle import open_bundle
from fedtune.common.seeds import generator
from fedtune.round.batches import local_batches
from fedtune.training.local import to_batch, train_locally

MU = 3.0


@pytest.mark.parametrize("optimizer, rate", [("sgd", 0.1), ("adamw", 0.05)])
def test_steps_are_those_of_the_loss_with_its_term(optimizer, rate, tiny_job, run_rounds, tmp_path):
    """Autograd on F(w) + mu/2 |w - w_t|^2 against what `train_locally` does."""
    simulation = run_rounds(
        tiny_job(
            "federation.rounds=1",
            f"federation.proximal={MU}",
            f"federation.optimizer={optimizer}",
            f"federation.lr={rate}",
            "federation.lean=off",
        ),
        tmp_path / "run",
    )
    setup, bundle = simulation.setup, open_bundle(simulation.run.bundle)
    fed, data = setup.job.federation, setup.store.train(setup.split.clients[0])

    def opened():
        model = setup.fresh_model()
        parameters = methods.attach(model, setup.spec, bundle.frame)
        methods.write(parameters, bundle.initial)
        return model, parameters

    model, parameters = opened()
    train_locally(model, parameters, data, setup.encoder, fed, 1, generator(0, "x"))
    plain, truth = opened()
    start = {n: p.detach().clone() for n, p in truth.items()}
    made = (
        torch.optim.SGD(truth.values(), lr=rate)
        if optimizer == "sgd"
        else torch.optim.AdamW(truth.values(), lr=rate, weight_decay=0.0)
    )
    for index in local_batches(data.lengths, fed.batch_size, 1, 0, generator(0, "x")):
        batch, labels = to_batch(data, index, setup.encoder)
        loss, _, count = plain.loss(plain(**batch), batch, labels)
        term = sum(((p - start[n]) ** 2).sum() for n, p in truth.items())
        made.zero_grad()
        (loss.sum() / count.sum() + MU / 2 * term).backward()
        made.step()
    moved = 0.0
    for n, p in parameters.items():
        torch.testing.assert_close(p, truth[n], rtol=0, atol=1e-5 if optimizer == "sgd" else 2e-4)
        moved += float((p.detach() - start[n]).norm())
    assert moved > 1e-3


@pytest.mark.parametrize(
    "private",
    [
        (),
        (
            "privacy.unit=example",
            "privacy.noise-multiplier=0.7",
            "privacy.clip=0.5",
            "privacy.examples=16",
            "federation.weighting=equal",
            "privacy.noise=seeded",
            "privacy.i-understand=true",
        ),
    ],
    ids=["plain", "private"],
)
def test_engines_agree_and_it_holds_clients_back(private, tiny_job, run_rounds, tmp_path):
    found = {}
    for engine in ("serial", "vectorised"):
        for mu in (0.0, MU):
            job = tiny_job(
                "federation.rounds=1",
                "federation.optimizer=sgd",
                "federation.lr=0.05",
                "federation.local-epochs=3",
                f"federation.proximal={mu}",
                f"simulation.engine={engine}",
                *private,
            )
            run = run_rounds(job, tmp_path / f"{engine}-{mu}").run
            bundle, state = open_bundle(run.bundle), run.newest().state
            found[engine, mu] = np.concatenate(
                [(state.arrays[n] - bundle.initial[n]).ravel() for n in state.arrays]
            )
    for mu in (0.0, MU):
        np.testing.assert_allclose(found["serial", mu], found["vectorised", mu], rtol=0, atol=1e-5)
    assert 0 < np.linalg.norm(found["serial", MU]) < np.linalg.norm(found["serial", 0.0])
