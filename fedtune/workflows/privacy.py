"""What a run spent of its privacy, read from its folder alone: job, run.json and ledger.

No torch, no data, no base.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from fedtune.common.storage import write_atomic
from fedtune.job import Job
from fedtune.privacy.account import Account, account, assumptions, spent
from fedtune.privacy.accounting import ACCOUNTANTS, LARGEST
from fedtune.privacy.plan import PrivacyPlan, kept
from fedtune.privacy.releases import Release, read
from fedtune.report.privacy import Epsilon, Privacy
from fedtune.runs.folder import RunFolder
from fedtune.runs.ledger import Ledger, require_whole

LIGHT = ("pld", "rdp")
"""Accountants that need no torch: Opacus brings it."""
AS_TRAINED = "Updates were sent as trained."


def privacy_of(run: RunFolder, accountants: Sequence[str] = ACCOUNTANTS) -> Privacy:
    """The `privacy` of a summary, of a run finished or not; infinity is "inf".

    Raises RunError for a ledger or a job that was changed: nothing is claimed from those.
    """
    job, events = run.job(), releases(run)
    if job.privacy.unit != "none":  # a run without privacy claims nothing that a changed job could make wrong
        run.require_own_job()
    names, others = holders(run, events)
    plan = kept(job, len(names) + others)
    if plan is None:
        return {"unit": "none", "epsilon": "inf", "note": AS_TRAINED}
    found = account(events, names, plan, accountants, others)
    said: Privacy = {
        "unit": plan.unit,
        "epsilon": figure(found.epsilon),
        "note": _note(job, events, len(names) + others, found),
        "delta": found.delta,
        "noise_multiplier": plan.parts["update"],
        "clip": job.privacy.clip,
        "accountant": found.worst.best,
        "readings": {name: figure(value) for name, value in found.worst.by},
        "target": job.privacy.epsilon,
        "client": found.client,
        "spread": [{"epsilon": figure(value), "clients": count} for value, count in found.spread],
        "rounds": [{"round": round, "epsilon": figure(value)} for round, value in found.rounds],
        "parts": {name: figure(value) for name, value in found.parts.items()},
        "assumptions": assumptions(plan),
    }
    return said if math.isinf(found.left) else {**said, "left": found.left}


def title_of(run: RunFolder) -> str:
    return run.job().report.title or run.path.resolve().name


def write_privacy_page(run: RunFolder, found: Privacy) -> Path:
    """privacy.html in the run folder."""
    from fedtune.report.privacy_page import render  # here, because drawing needs matplotlib

    began = run.facts()
    write_atomic(
        run.path / "privacy.html",
        render(found, title_of(run), began["created"], began["versions"].get("fedtune", "")).encode(),
    )
    return run.path / "privacy.html"


def releases(run: RunFolder) -> list[tuple[int, Release]]:
    """(round, release) of the ledger's events.

    Raises RunError unless it is whole, as far as the rounds have come.
    """
    lines = run.metrics()
    rounds = lines[-1]["round"] if lines else 0
    if not rounds and not run.ledger.exists():
        return []
    require_whole(run.ledger, rounds, 0 if run.job().adapter.asks_gradients else 1)
    return _events(run)


def _events(run: RunFolder) -> list[tuple[int, Release]]:
    return (
        [(event.round, read(event.facts)) for event in Ledger(run.ledger).events()]
        if run.ledger.exists()
        else []
    )


def holders(run: RunFolder, events: Sequence[tuple[int, Release]]) -> tuple[list[str], int]:
    """(names of the clients, how many there are beside these).

    Of a live run only those that were asked are known.
    """
    began = run.facts()
    names = dict.fromkeys(
        [row["name"] for row in began["split"]] + [name for _, release in events for name in release.names]
    )
    return list(names), max(0, began.get("population", {}).get("clients", 0) - len(names))


def spent_so_far(run: RunFolder, plan: PrivacyPlan | None) -> Epsilon:
    """Epsilon by now of the client that has lost most, in the JSON of a status:
    "inf" once anything left without protection.
    """
    left = [release for _, release in _events(run)]
    if plan is None:
        return "inf" if left else 0.0
    return figure(spent(left, plan.delta))


def figure(epsilon: float) -> Epsilon:
    """As JSON has it, which knows no infinity. What is not a number claims nothing."""
    return float(epsilon) if 0 <= epsilon <= LARGEST else "inf"


def _note(job: Job, events: Sequence[tuple[int, Release]], clients: int, found: Account) -> str:
    """What a reader of the figure must know besides."""
    bare = [round for round, release in events if release.mechanism == "none"]
    if bare:
        return f"{len(bare)} of {len(events)} releases left without noise, the first in round {bare[0]}."
    if job.privacy.noise == "seeded":
        return "The noise came from a known seed, for comparisons: whoever knows the seed can take it away."
    if not events:
        return "Nothing has left the clients yet."
    return f"Of {clients} clients, {found.client} lost most." if found.client else ""
