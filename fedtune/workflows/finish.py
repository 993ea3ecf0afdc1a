"""After the last round: final scores, baselines, summary.json, the page. Each part is kept, so finishing can be interrupted too."""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fedtune.bundle import open_bundle
from fedtune.data.partition import describe
from fedtune.metrics import value, worst_tenth
from fedtune.rounds import Traffic
from fedtune.run import RunFolder
from fedtune.storage import write_atomic, write_json
from fedtune.wire import encode
from fedtune.workflows import baselines
from fedtune.workflows.setup import Setup
from fedtune.workflows.simulate import Simulation

Stage = Callable[[str], None]


def finish(simulation: Simulation, stage: Stage) -> dict[str, Any]:
    """Writes summary.json for a run at its last checkpoint, with baselines as the job asks, and returns it."""
    run, setup = simulation.run, simulation.setup
    checkpoint = run.newest()
    assert checkpoint is not None, "rounds() writes checkpoint 0 first"
    stage("scoring the final model on all held-out data")
    scores = simulation.scores(checkpoint.state.arrays)
    data, owner = simulation.held_out
    summary = facts(setup, run)
    clients = baselines.per_client(setup, scores, owner)
    accuracies = [c["accuracy"] for c in clients]
    metrics = scores.metrics()
    summary["final"] = {
        "accuracy": value(metrics, "accuracy"), "loss": value(metrics, "loss"), "clients": clients,
        "mean": sum(accuracies) / len(accuracies) if accuracies else None, "worst_tenth": worst_tenth(accuracies),
    }
    found: dict[str, Any] = {}
    if setup.job.model.task != "causal-lm":
        found["majority"] = baselines.majority(setup, data.labels)
    if "local" in setup.job.evaluation.baselines:
        found["local"] = baselines.clients_alone(simulation, run.first_arrays(), scores, checkpoint.counters["rounds"], stage)
    if "head" in setup.job.evaluation.baselines and setup.job.model.task != "causal-lm":
        stage("baseline: the frozen base with a head")
        found["head"] = baselines.head_on_frozen_base(simulation)
    summary["baselines"] = found
    summary["complete"] = checkpoint.state.round >= setup.job.federation.rounds
    write_summary(run, summary)
    return summary


def facts(setup: Setup, run: RunFolder) -> dict[str, Any]:
    """What a summary says of any run, finished or not."""
    job, spec, lines, started = setup.job, setup.spec, run.metrics(), run.facts()
    manifest = open_bundle(run.bundle).manifest
    return {
        "title": job.report.title or f"{job.adapter.method} on {job.data.source.partition(':')[2] or job.data.source}",
        "created": started.get("created", datetime.now(UTC).isoformat(timespec="seconds")),
        "versions": started.get("versions", {}), "job": job.model_dump(mode="json", by_alias=True), "engine": job.simulation.engine,
        "base": {"source": manifest.source, "sha256": manifest.sha256, "parameters": manifest.parameters, "licence": manifest.licence},
        "task": job.model.task, "metric": "accuracy", "labels": list(manifest.labels),
        "adapter": {"method": spec.method, "rank": spec.rank, "init": job.adapter.init, "trainable": spec.size, "head": spec.head_size, "modules": len(spec.linears)},
        "split": describe(setup.split, setup.dataset), "rounds": per_round(lines), "communication": communication(setup, run, lines),
        "privacy": {"unit": job.privacy.unit, "epsilon": "inf", "note": "Updates were sent as trained: no differential privacy is claimed."},
        "complete": False, "wall_seconds": round(sum(line["seconds"] for line in lines), 3),
    }


def per_round(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl with running byte totals turned into bytes of the round."""
    before, rows = {"up": 0, "down": 0}, []
    for line in lines:
        rows.append(line | {key: line[key] - before[key] for key in before})
        before = {key: line[key] for key in before}
    return rows


def communication(setup: Setup, run: RunFolder, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals and each client's bytes, from the newest checkpoint's counters."""
    checkpoint, bundle = run.newest(), open_bundle(run.bundle)
    traffic = Traffic(**checkpoint.counters) if checkpoint else Traffic()
    update = encode("update", setup.spec.schema, checkpoint.state.arrays, round=1, frame=bundle.frame_digest, weight=1.0) if checkpoint else b""
    names = sorted(traffic.down.keys() | traffic.up.keys())
    return {
        "trainable_numbers": setup.spec.size, "update_bytes": len(update), "frame_bytes": bundle.frame_bytes,
        "up": sum(traffic.up.values()), "down": sum(traffic.down.values()), "messages": 2 * sum(traffic.rounds.values()),
        "clients": [{"name": n, "up": traffic.up.get(n, 0), "down": traffic.down.get(n, 0), "rounds": traffic.rounds.get(n, 0)} for n in names],
    }


def write_summary(run: RunFolder, summary: dict[str, Any]) -> None:
    """summary.json, and report.html where the job wants it."""
    from fedtune.report.page import render
    from fedtune.report.summary import check

    summary = _finite(summary)
    write_json(run.summary, summary)
    if run.job().report.html:
        write_atomic(run.page, render(check(summary)).encode())


def _finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
