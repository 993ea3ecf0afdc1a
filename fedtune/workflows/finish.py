"""After the last round: final scores, baselines, exports, and the summary with its page."""

from typing import Any

import numpy as np

from fedtune.algorithms import State
from fedtune.data.partition import Split
from fedtune.metrics import merge, tenth, value
from fedtune.stateful.methods import is_personal
from fedtune.training.evaluate import Scores, by_client
from fedtune.types import Metrics
from fedtune.workflows import baselines
from fedtune.workflows.export import export_run
from fedtune.workflows.simulate import Simulation
from fedtune.workflows.summary import facts, final_of, personal_of, write_summary


def finish(simulation: Simulation) -> dict[str, Any]:
    """Scores the model of the last checkpoint, measures the baselines the job asks for, exports, writes summary and page.

    The summary is written before the export too: a graph that fails its check costs the graph, not the report.
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
    if is_personal(simulation.setup.job):
        summary["personal"] = personal(simulation, checkpoint.state, scores)
    write_summary(run, summary)
    summary["export"] = export_run(run, simulation.setup, lambda text: watch.stage(text, 0))
    write_summary(run, summary)
    return summary


def final(split: Split, scores: Scores) -> dict[str, Any]:
    """The last evaluation over all held-out examples, and its spread over clients."""
    clients = by_client(scores, split.held_out)
    listed = baselines.listed(clients)
    found = final_of(scores.metrics(), baselines.rows(split.clients, clients, listed), clients.accuracy.tolist())
    if len(listed) < len(clients):
        ranked = clients.ranked()
        worst = ranked[: tenth(len(ranked))]
        found["whole"] = {"clients": len(ranked), "examples": int(clients.examples.sum()), "worst_examples": int(clients.examples[worst].sum())}
    return found


def personal(simulation: Simulation, state: State, scores: Scores) -> dict[str, Any]:
    """What clients predict with on their own, beside the global model on the same held-out examples."""
    ours, beside, examples = list[Metrics](), list[Metrics](), 0
    for _, index, own in simulation.personal_scores(state.round, state.arrays):
        ours.append(own.metrics())
        beside.append(scores.metrics(index))
        examples += len(index)
    return personal_of(merge(ours), merge(beside), [value(metrics, "accuracy") for metrics in ours], len(simulation.setup.split.clients), examples)


def measure(simulation: Simulation, scores: Scores, took_part: dict[str, int]) -> dict[str, Any]:
    """The baselines of the job. `scores` are the federated model's; `took_part`: rounds by client."""
    setup, found = simulation.setup, {}
    classify, wanted = setup.job.model.task != "causal-lm", setup.job.evaluation.baselines
    if classify:
        found["majority"] = baselines.majority(setup)
    if "local" in wanted:
        found["local"] = baselines.clients_alone(simulation, scores, took_part)
    several = len(np.unique(setup.dataset.examples.labels[setup.split.train.rows])) > 1
    if "head" in wanted and classify and several:  # one label leaves nothing to fit
        found["head"] = baselines.head_on_frozen_base(simulation, scores)
    return found
