"""What a run folder says of itself, as summary.json and the page.

Reads the folder alone: no torch, no data, no base.
"""

import math
from collections.abc import Sequence
from typing import Any

from fedtune.algorithms.units import limits_in, round_bytes
from fedtune.bundles.bundle import Bundle, open_bundle
from fedtune.common.metrics import value, worst_tenth
from fedtune.common.storage import write_atomic, write_json
from fedtune.errors import RunError
from fedtune.privacy.accounting import ACCOUNTANTS
from fedtune.report.events import Events
from fedtune.report.summary import Summary, check, few
from fedtune.round.coordinator import Coordinator
from fedtune.round.traffic import Traffic
from fedtune.round.watch import Watch
from fedtune.runs.folder import RunFolder
from fedtune.runs.ledger import require_whole
from fedtune.types import Metrics
from fedtune.wire import Schema
from fedtune.workflows.privacy import privacy_of


def facts(run: RunFolder, accountants: Sequence[str] = ACCOUNTANTS) -> dict[str, Any]:
    """All of a summary but the final scores, baselines and exports, of a run finished or not.

    Raises RunError when not even round 0 is there, or the ledger is not that of its rounds.
    """
    lines, checkpoint = run.metrics(), run.newest()
    if checkpoint is not None:
        run.require_metrics(checkpoint)
    if not lines or checkpoint is None:
        raise RunError(
            f"{run.path}: no round is finished yet, not even the start; "
            f"continue it with `fedtune simulate --resume {run.path}`"
        )
    require_whole(run.ledger, lines[-1]["round"], 0 if run.job().adapter.asks_gradients else 1)
    job, started, bundle = run.job(), run.facts(), open_bundle(run.bundle)
    manifest, spec = bundle.manifest, bundle.manifest.spec
    return (
        {
            "title": job.report.title or f"{job.adapter.method} on {job.data.source.rpartition(':')[2]}",
            "created": started["created"],
            "versions": started["versions"],
            "job": job.model_dump(mode="json", by_alias=True),
            "engine": job.simulation.engine,
            "base": {
                "source": manifest.source,
                "sha256": manifest.sha256,
                "parameters": manifest.parameters,
                "licence": manifest.licence,
            },
            "task": job.model.task,
            "metric": "accuracy",
            "labels": list(manifest.labels),
            "adapter": {
                "method": spec.method,
                "rank": spec.rank,
                "init": job.adapter.init,
                "trainable": spec.size,
                "head": spec.head_size,
                "modules": len(spec.linears),
            },
            "split": started["split"],
            **({"population": started["population"]} if "population" in started else {}),
            "rounds": per_round(lines),
            "communication": communication(bundle, Traffic(**checkpoint.counters)),
            "privacy": privacy_of(run, accountants),
            "complete": False,
            "wall_seconds": round(sum(line["seconds"] for line in lines), 3),
        }
        | devices(lines)
        | units(lines, bundle.schema)
        | ranks(lines, bundle)
    )


def per_round(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl with running byte totals turned into bytes of the round,
    and simulated seconds also added up.
    """
    before, rows, clock = {"up": 0, "down": 0}, [], 0.0
    for line in lines:
        rows.append(line | {key: line[key] - before[key] for key in before})
        before = {key: line[key] for key in before}
        if "simulated_seconds" in line:
            clock += line["simulated_seconds"]
            rows[-1]["simulated_clock"] = round(clock, 3)
    return rows


def devices(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The device classes with what their rounds add up to; nothing for a run without."""
    found = [line["devices"] for line in lines if "devices" in line]
    if not found:
        return {}
    return {
        "devices": [
            {"name": name, "clients": first["clients"], "able": first["able"]}
            | {
                key: sum(tallies[name][key] for tallies in found)
                for key in first
                if key not in ("clients", "able")
            }
            for name, first in found[0].items()
        ]
    }


def units(lines: list[dict[str, Any]], schema: Schema) -> dict[str, Any]:
    """How often each unit was trained, and its score at the last probe;
    nothing for a run in which all clients train all.
    """
    found = [line["units"] for line in lines if "units" in line]
    if not found:
        return {}
    scores: dict[str, float] = next((line["scores"] for line in reversed(lines) if "scores" in line), {})
    return {
        "units": [
            {
                "name": name,
                "rounds": sum(name in counts for counts in found),
                "updates": sum(counts.get(name, 0) for counts in found),
            }
            | ({"score": scores[name]} if name in scores else {})
            for name in dict.fromkeys(
                (*(unit for unit in schema.units if unit == "outside"), *schema.base_blocks, *schema.units)
            )
        ]
    }


def ranks(lines: list[dict[str, Any]], bundle: Bundle) -> dict[str, Any]:
    """How often clients of each rank trained, and how many numbers they have;
    nothing for a run in which all have the same.
    """
    found = [line["ranks"] for line in lines if "ranks" in line]
    if bundle.ranks is None:
        return {}
    return {
        "ranks": [
            {
                "rank": rank,
                "numbers": bundle.schema.held(rank).size,
                "rounds": sum(str(rank) in counts for counts in found),
                "updates": sum(counts.get(str(rank), 0) for counts in found),
            }
            for rank in bundle.ranks.all
        ]
    }


def communication(bundle: Bundle, traffic: Traffic) -> dict[str, Any]:
    """Totals and the bytes of each client that was asked; of many, of an even choice from least to most."""
    job, spec = bundle.job, bundle.manifest.spec
    largest = max(
        update
        for limits in limits_in(job)
        for _, update in round_bytes(job, bundle.schema, job.federation.rounds, limits)
    )
    asked = sorted(
        traffic.down.keys() | traffic.up.keys(),
        key=lambda n: (traffic.up.get(n, 0) + traffic.down.get(n, 0), n),
    )
    names = sorted(asked[i] for i in few(len(asked)))
    return {
        "trainable_numbers": spec.size,
        **({"sent_numbers": bundle.schema.size} if bundle.schema.size != spec.size else {}),
        "update_bytes": largest,
        "frame_bytes": bundle.frame_bytes,
        "up": sum(traffic.up.values()),
        "down": sum(traffic.down.values()),
        "messages": traffic.messages,
        "evaluation": traffic.evaluation,
        "offers": traffic.offers,
        "probes": traffic.probes,
        "clients": [
            {
                "name": n,
                "up": traffic.up.get(n, 0),
                "down": traffic.down.get(n, 0),
                "rounds": traffic.rounds.get(n, 0),
            }
            for n in names
        ],
        **(
            {"took_part": sum(rounds > 0 for rounds in traffic.rounds.values())}
            if len(names) < len(asked)
            else {}
        ),
    }


def client_row(name: str, metrics: Metrics, examples: int) -> dict[str, Any]:
    """A client's held-out scores."""
    return {
        "name": name,
        "accuracy": value(metrics, "accuracy"),
        "loss": value(metrics, "loss"),
        "examples": examples,
    }


def final_of(
    metrics: Metrics, rows: list[dict[str, Any]], all_: Sequence[float] | None = None
) -> dict[str, Any]:
    """The last evaluation: all held-out examples as one, and the spread over clients.

    `all_`: accuracies of all, where `rows` lists some.
    """
    accuracies = [row["accuracy"] for row in rows] if all_ is None else all_
    return {
        "accuracy": value(metrics, "accuracy"),
        "loss": value(metrics, "loss"),
        "clients": rows,
        "mean": sum(accuracies) / len(accuracies) if accuracies else None,
        "worst_tenth": worst_tenth(accuracies),
    }


def personal_of(
    metrics: Metrics, federated: Metrics, accuracies: Sequence[float], clients: int, examples: int
) -> dict[str, Any]:
    """Clients' own models at the end, over the held-out examples of those that have one, and the global
    model on the same; `clients`: all there are.
    """
    return {
        "accuracy": value(metrics, "accuracy"),
        "loss": value(metrics, "loss"),
        "federated": value(federated, "accuracy"),
        "worst_tenth": worst_tenth(accuracies),
        "clients": len(accuracies),
        "of": clients,
        "examples": examples,
    }


def follow(coordinator: Coordinator, watch: Watch) -> None:
    """Shows every finished round in TensorBoard and to the watch, and the watch every reply."""
    events = Events(coordinator.run.path / "tensorboard")

    def on_round(line: dict[str, Any]) -> None:
        events.add(line)
        watch.line(line)

    coordinator.on_reply, coordinator.on_round = watch.reply, on_round


def write_summary(run: RunFolder, summary: dict[str, Any]) -> None:
    """summary.json, and report.html where the job wants it."""
    summary = _finite(summary)
    write_page(run, check(summary))  # first: a summary then means a page of the same run
    write_json(run.summary, summary)


def write_page(run: RunFolder, summary: Summary) -> None:
    """report.html, where the job wants it."""
    from fedtune.report.page import render  # here, because drawing needs matplotlib

    if run.job().report.html:
        write_atomic(run.page, render(summary).encode())


def _finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
