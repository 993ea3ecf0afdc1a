"""A round as metrics.jsonl has it."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedtune.algorithms import State
from fedtune.algorithms.units import ROWS
from fedtune.common.metrics import PERSONAL_CLIENTS, value
from fedtune.job import Job
from fedtune.round.probing import Probe
from fedtune.round.traffic import Traffic
from fedtune.types import Metrics, RoundReport, Work
from fedtune.wire import Schema


def round_line(
    report: RoundReport, held_out: Metrics | None, traffic: Traffic, seconds: float
) -> dict[str, Any]:
    """One round as metrics.jsonl has it. Figures that were not measured are null."""
    return {
        "round": report.round,
        "train_loss": _figure(report.metrics, "loss"),
        "train_accuracy": _figure(report.metrics, "accuracy"),
        **held_out_of(held_out),
        "up": sum(traffic.up.values()),
        "down": sum(traffic.down.values()),
        "total_bytes": traffic.total,
        "seconds": round(seconds, 3),
        "clients": list(report.clients),
        "refused": dict(report.refused),
        "late": traffic.late,
    }


def held_out_of(metrics: Metrics | None) -> dict[str, Any]:
    """What a line says of the held-out examples, and of those of clients that predict with something of
    their own by what they then get right.
    """
    found = {
        "loss": _figure(metrics, "loss"),
        "accuracy": _figure(metrics, "accuracy"),
        "evaluated": int(metrics["accuracy"][1]) if metrics else 0,
    }
    if metrics is None or PERSONAL_CLIENTS not in metrics:
        return found
    return found | {
        "personal_loss": _figure(metrics, "personal_loss"),
        "personal_accuracy": _figure(metrics, "personal_accuracy"),
        "personal_evaluated": int(metrics.get("personal_accuracy", (0.0, 0.0))[1]),
        PERSONAL_CLIENTS: int(metrics[PERSONAL_CLIENTS][0]),
    }


def trained_in(
    job: Job, schema: Schema, report: RoundReport, planned: Mapping[str, Work], probe: Probe, state: State
) -> dict[str, Any]:
    """How many of the clients averaged had each rank, and trained each unit, where they are not all
    alike; and of this round's probe the mean scores, and who gave none that counts.
    """
    found: dict[str, Any] = {}
    if any(t.rank for t in schema.tensors):
        ranks = Counter(planned[client].rank or job.adapter.rank for client in report.clients)
        found["ranks"] = {str(rank): ranks[rank] for rank in sorted(ranks)}
    if job.units.chosen.whole:
        return found
    counts = Counter(unit for client in report.clients for unit in planned[client].units)
    found["units"] = {unit: counts[unit] for unit in schema.units if counts[unit]}
    if probe.asked and report.round:
        found["unprobed"] = dict(probe.silent)
        if len(probe.silent) < len(probe.asked):
            found["scores"] = dict(zip(schema.blocks, state.slots[ROWS].mean(0).round(6).tolist()))
    return found


def evaluated(job: Job, round: int) -> bool:
    """Whether the model after so many rounds is scored on held-out data; the last always is."""
    return round == job.federation.rounds or round % job.evaluation.every == 0


def _figure(metrics: Metrics | None, name: str) -> float | None:
    found = value(metrics or {}, name)
    return found if math.isfinite(found) else None
