"""What a federated result is measured against: the majority label, the frozen base with a head, and
clients that train alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.common.metrics import merge, value, worst_tenth
from fedtune.common.seeds import generator
from fedtune.report.summary import LISTED, few
from fedtune.training.evaluate import ClientScores, Scores, by_client, features
from fedtune.types import Metrics
from fedtune.workflows.setup import Setup
from fedtune.workflows.simulate import Simulation

LEAST = 5
"""Clients served worst that are listed in any case."""


def majority(setup: Setup) -> dict[str, float]:
    """Accuracy of always answering the most common training label, on all held-out examples."""
    train, labels = (
        setup.dataset.examples.labels[side.rows] for side in (setup.split.train, setup.split.held_out)
    )
    most = np.bincount(train, minlength=setup.classes).argmax()
    return {"accuracy": float((labels == most).mean()) if len(labels) else float("nan")}


def head_on_frozen_base(simulation: Simulation, federated: Scores) -> dict[str, Any]:
    """The base as it came, with a logistic regression on its features, fitted on all clients' pooled training
    data. It lists the clients that the `federated` result lists.

    Generous to the base: nobody could fit it so without moving the data.
    scikit-learn's solver, run to convergence.
    """
    from sklearn.linear_model import LogisticRegression

    setup = simulation.setup
    model, batch = setup.fresh_model(), setup.job.evaluation.batch_size
    train, held_out = setup.store.stream(setup.split.train.rows), simulation.held_out
    simulation.watch.stage("baseline: the frozen base with a head", len(train) + len(held_out))
    seen, asked = (
        features(model, part, setup.encoder, batch, simulation.watch.advance) for part in (train, held_out)
    )
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
    ours, theirs = (by_client(found, setup.split.held_out) for found in (federated, scores))
    places = listed(ours)
    return {
        "accuracy": value(scores.metrics(), "accuracy"),
        "loss": value(scores.metrics(), "loss"),
        "clients": rows(setup.split.clients, theirs, places),
        **({"whole": against(ours, theirs)} if len(places) < len(ours) else {}),
    }


def against(ours: ClientScores, theirs: ClientScores) -> dict[str, Any]:
    """On how many of all clients the federated model is better or equal, and the baseline's worst tenth."""
    both = np.isfinite(ours.accuracy) & np.isfinite(theirs.accuracy)
    gain = (ours.accuracy - theirs.accuracy)[both]
    return {
        "clients": len(gain),
        "better": int((gain > 0).sum()),
        "equal": int((gain == 0).sum()),
        "worst_tenth": worst_tenth(theirs.accuracy[both]),
    }


def clients_alone(simulation: Simulation, federated: Scores, took_part: dict[str, int]) -> dict[str, Any]:
    """Clients that train the same adapter, in each round the same units, from the same start on their own
    data, each for as many local rounds as it took part in the federated run (at least one), beside the
    federated model on the same held-out examples.
    """
    setup, start = simulation.setup, simulation.run.first_arrays()
    if setup.job.edge.mode == "backward":
        start = simulation.worker.open().trained(start)
    offsets = setup.split.held_out.offsets
    found: list[dict[str, Any]] = []
    both: tuple[list[Metrics], list[Metrics]] = ([], [])
    drawn = drawn_clients(setup)
    simulation.watch.stage("baseline: clients that train alone", len(drawn))
    for place in drawn:
        name = setup.split.clients[place]
        held_out = setup.store.held_out(name)
        simulation.watch.advance(1)
        rank, own = simulation.limits(name).rank, start
        if (ranks := simulation.worker.open().ranks) is not None:
            own = ranks.leading(start, rank)
        for round in range(1, max(1, took_part.get(name, 0)) + 1):
            trained, _ = simulation.worker.train(
                own, name, setup.store.train(name), round, simulation.assigned(name, round), rank=rank
            )
            own = own | trained
        alone = simulation.worker.metrics(own if ranks is None else ranks.split(ranks.whole(own)), held_out)
        together = federated.metrics(slice(offsets[place], offsets[place + 1]))
        both[0].append(alone)
        both[1].append(together)
        found.append(
            {
                "name": name,
                "accuracy": value(alone, "accuracy"),
                "federated": value(together, "accuracy"),
                "examples": len(held_out),
            }
        )
    accuracy, beside = (value(merge(parts), "accuracy") for parts in both)
    kept = [found[i] for i in few(len(found))]
    return {
        "clients": kept,
        "accuracy": accuracy,
        "federated": beside,
        "of": len(setup.split.clients),
        **({"trained": len(found)} if len(kept) < len(found) else {}),
    }


def drawn_clients(setup: Setup) -> list[int]:
    """Places of the clients that train alone: `evaluation.local-clients` of those with held-out
    data, drawn by the seed.
    """
    able = np.flatnonzero(setup.split.held_out.sizes)
    rng = generator(setup.job.federation.seed, "local-baseline")
    return sorted(
        rng.choice(
            able, size=min(setup.job.evaluation.local_clients or len(able), len(able)), replace=False
        ).tolist()
    )


def listed(clients: ClientScores) -> np.ndarray:
    """Which clients a summary lists, by their places in `clients`, ascending: all, or of many the worst few
    and an even choice from worst to best.
    """
    if len(clients) <= LISTED:
        return np.arange(len(clients))
    ranked = clients.ranked()
    return np.sort(ranked[sorted({*range(LEAST), *few(len(ranked), LISTED - LEAST)})])


def rows(names: Sequence[str], clients: ClientScores, places: np.ndarray) -> list[dict[str, Any]]:
    """Held-out accuracy and loss of the clients at these places of `clients`."""
    return [
        {"name": names[place], "accuracy": accuracy, "loss": loss, "examples": examples}
        for place, accuracy, loss, examples in zip(
            *(
                column[places].tolist()
                for column in (clients.places, clients.accuracy, clients.loss, clients.examples)
            )
        )
    ]
