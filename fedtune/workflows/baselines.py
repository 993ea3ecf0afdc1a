"""What a federated result is measured against: the majority label, the frozen base with a head, and clients that train alone."""

from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.adapters import methods
from fedtune.metrics import merge, value
from fedtune.seeds import generator
from fedtune.training.evaluate import Scores, features, join, score
from fedtune.training.local import train_locally
from fedtune.types import Metrics
from fedtune.workflows.setup import Setup
from fedtune.workflows.simulate import Simulation
from fedtune.workflows.summary import client_row


def majority(setup: Setup, labels: np.ndarray) -> dict[str, float]:
    """Accuracy of always answering the most common training label, on held-out `labels` [n]."""
    train = np.concatenate([setup.dataset.examples.labels[i] for i in setup.split.train])
    most = np.bincount(train, minlength=setup.classes).argmax()
    return {"accuracy": float((labels == most).mean()) if len(labels) else float("nan")}


def head_on_frozen_base(simulation: Simulation) -> dict[str, Any]:
    """The base as it came, with a logistic regression on its features, fitted on all clients' pooled training data.

    Generous to the base: nobody could fit it so without moving the data. scikit-learn's solver, run to convergence.
    """
    from sklearn.linear_model import LogisticRegression

    setup = simulation.setup
    model, batch = setup.fresh_model(), setup.job.evaluation.batch_size
    train = join([setup.store.train(c) for c in setup.split.clients])
    held_out, owner = simulation.held_out
    simulation.watch.stage("baseline: the frozen base with a head", len(train) + len(held_out))
    seen, asked = (features(model, part, setup.encoder, batch, simulation.watch.advance) for part in (train, held_out))
    fitted = LogisticRegression(max_iter=5000).fit(seen, train.labels)
    logits = torch.full((len(held_out), setup.classes), -1e9)
    found = torch.from_numpy(fitted.decision_function(asked).astype(np.float32))
    columns = fitted.classes_.tolist()
    if found.ndim == 1:  # two labels: one column, the second label's log-odds
        found = torch.stack([torch.zeros_like(found), found], 1)
    logits[:, columns] = found
    labels = torch.from_numpy(held_out.labels)
    loss = nn.functional.cross_entropy(logits, labels, reduction="none").double().numpy()
    scores = Scores(loss, (logits.argmax(1) == labels).double().numpy(), np.ones(len(labels)))
    return {"accuracy": value(scores.metrics(), "accuracy"), "loss": value(scores.metrics(), "loss"), "clients": per_client(setup, scores, owner)}


def clients_alone(simulation: Simulation, federated: Scores, took_part: dict[str, int]) -> dict[str, Any]:
    """Clients that train the same adapter from the same start on their own data, each for as many local rounds as it took
    part in the federated run (at least one), beside the federated model on the same held-out examples."""
    setup, start, owner = simulation.setup, simulation.run.first_arrays(), simulation.held_out[1]
    rows: list[dict[str, Any]] = []
    both: tuple[list[Metrics], list[Metrics]] = ([], [])
    drawn = drawn_clients(setup)
    simulation.watch.stage("baseline: clients that train alone", len(drawn))
    for place in drawn:
        name = setup.split.clients[place]
        held_out = setup.store.held_out(name)
        simulation.watch.advance(1)
        methods.write(simulation.worker.parameters, start)
        for round in range(1, max(1, took_part.get(name, 0)) + 1):
            rng = generator(setup.job.federation.seed, "local", round, name)
            train_locally(simulation.model, simulation.worker.parameters, setup.store.train(name), setup.encoder, setup.job.federation, round, rng)
        alone = score(simulation.model, held_out, setup.encoder, setup.job.evaluation.batch_size).metrics()
        together = federated.metrics(np.flatnonzero(owner == place))
        both[0].append(alone)
        both[1].append(together)
        rows.append({"name": name, "accuracy": value(alone, "accuracy"), "federated": value(together, "accuracy"), "examples": len(held_out)})
    accuracy, beside = (value(merge(parts), "accuracy") for parts in both)
    return {"clients": rows, "accuracy": accuracy, "federated": beside, "of": len(setup.split.clients)}


def drawn_clients(setup: Setup) -> list[int]:
    """Places of the clients that train alone: `evaluation.local-clients` of those with held-out data, drawn by the seed."""
    able = [place for place, held_out in enumerate(setup.split.held_out) if len(held_out)]
    rng = generator(setup.job.federation.seed, "local-baseline")
    return sorted(rng.choice(able, size=min(setup.job.evaluation.local_clients or len(able), len(able)), replace=False).tolist())


def per_client(setup: Setup, scores: Scores, owner: np.ndarray) -> list[dict[str, Any]]:
    """Held-out accuracy and loss of each client that has held-out examples."""
    places = {name: np.flatnonzero(owner == place) for place, name in enumerate(setup.split.clients)}
    return [client_row(name, scores.metrics(index), len(index)) for name, index in places.items() if len(index)]
