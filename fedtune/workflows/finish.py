"""After the last round: final scores, baselines, exports, and the summary with its page."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedtune.common.metrics import merge, tenth, value
from fedtune.data.partition import Split
from fedtune.stateful.methods import method_of
from fedtune.training.evaluate import Scores, by_client
from fedtune.workflows import baselines
from fedtune.workflows.export import export_run
from fedtune.workflows.setup import Setup
from fedtune.workflows.simulate import Simulation
from fedtune.workflows.summary import facts, final_of, personal_of, write_summary


def finish(simulation: Simulation) -> dict[str, Any]:
    """Scores the model of the last checkpoint, measures the baselines the job asks for, exports,
    writes summary and page.

    The summary is written before the export too: a graph that fails its check costs
    the graph, not the report.
    """
    run, watch = simulation.run, simulation.watch
    checkpoint = run.newest()
    assert checkpoint is not None, "rounds() writes checkpoint 0 first"
    watch.stage("scoring the final model on all held-out data", 0)
    scores = simulation.scores(checkpoint.state.arrays)
    summary = facts(run) | {
        "final": final(simulation.setup.split, scores),
        "baselines": measure(simulation, scores, checkpoint.counters["rounds"]),
        "complete": checkpoint.state.round >= simulation.setup.job.federation.rounds,
    }
    own = (
        list(simulation.personal_scores(checkpoint.state.round, checkpoint.state.arrays))
        if method_of(simulation.setup.job).personal
        else []
    )
    if method_of(simulation.setup.job).personal:
        summary["personal"] = personal(own, scores, len(simulation.setup.split.clients))
    if simulation.setup.task.has_head:
        summary["by_label"] = by_label(simulation.setup, scores, own)
    write_summary(run, summary)
    summary["export"] = export_run(run, simulation.setup, lambda text: watch.stage(text, 0))
    write_summary(run, summary)
    return summary


def final(split: Split, scores: Scores) -> dict[str, Any]:
    """The last evaluation over all held-out examples, and its spread over clients."""
    clients = by_client(scores, split.held_out)
    listed = baselines.listed(clients)
    found = final_of(
        scores.metrics(), baselines.rows(split.clients, clients, listed), clients.accuracy.tolist()
    )
    if len(listed) < len(clients):
        ranked = clients.ranked()
        worst = ranked[: tenth(len(ranked))]
        found["whole"] = {
            "clients": len(ranked),
            "examples": int(clients.examples.sum()),
            "worst_examples": int(clients.examples[worst].sum()),
        }
    return found


Own = Sequence[tuple[int, np.ndarray, Scores]]
"""As `Simulation.personal_scores` yields them."""


def personal(own: Own, scores: Scores, clients: int) -> dict[str, Any]:
    """What clients predict with on their own, beside the global model on the same held-out examples."""
    ours, beside = [found.metrics() for _, _, found in own], [scores.metrics(index) for _, index, _ in own]
    return personal_of(
        merge(ours),
        merge(beside),
        [value(metrics, "accuracy") for metrics in ours],
        clients,
        sum(len(index) for _, index, _ in own),
    )


def by_label(setup: Setup, scores: Scores, own: Own) -> list[dict[str, Any]]:
    """How well each label is found, over its held-out examples, those first that clients have most
    training examples of: with many labels the last are the tail.
    """
    names, of, parts = setup.dataset.label_names, setup.dataset.examples.labels, setup.split
    held_out = of[parts.held_out.rows]
    trained = np.bincount(of[parts.train.rows], minlength=len(names))

    def share(labels: np.ndarray, right: np.ndarray) -> list[float | None]:
        there, found = np.bincount(labels, minlength=len(names)), np.bincount(labels, right, len(names))
        return [float(f / t) if t else None for f, t in zip(found, there)]

    columns: dict[str, list[Any]] = {
        "train": trained.tolist(),
        "examples": np.bincount(held_out, minlength=len(names)).tolist(),
        "accuracy": share(held_out, scores.correct),
    }
    if own:
        columns["personal"] = share(
            np.concatenate([held_out[index] for _, index, _ in own]),
            np.concatenate([found.correct for *_, found in own]),
        )
    rows = [
        {"label": name, **{key: column[place] for key, column in columns.items()}}
        for place, name in enumerate(names)
    ]
    return [rows[place] for place in np.argsort(-trained, kind="stable").tolist()]


def measure(simulation: Simulation, scores: Scores, took_part: dict[str, int]) -> dict[str, Any]:
    """The baselines of the job. `scores` are the federated model's; `took_part`: rounds by client."""
    setup, found = simulation.setup, {}
    classify, wanted = setup.task.has_head, setup.job.evaluation.baselines
    if classify:
        found["majority"] = baselines.majority(setup)
    if "local" in wanted:
        found["local"] = baselines.clients_alone(simulation, scores, took_part)
    several = len(np.unique(setup.dataset.examples.labels[setup.split.train.rows])) > 1
    if "head" in wanted and classify and several:  # one label leaves nothing to fit
        found["head"] = baselines.head_on_frozen_base(simulation, scores)
    return found
