"""fedtune privacy audit: the job is run with canaries in it, and what they prove is held
against what the job claims.

The run is a real one, in a folder that is thrown away. Like every other run on the same data it would cost
privacy if its model or the audit's figures were given to others.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedtune.algorithms.units import budgets
from fedtune.errors import PrivacyRefused, UserError
from fedtune.job import Job
from fedtune.privacy.accounting import read_epsilon
from fedtune.privacy.audit import (
    CONFIDENCE,
    Outcome,
    accuracy,
    best_ceiling,
    count_right,
    expected_bound,
    planned_canaries,
    planned_guesses,
    take_guesses,
)
from fedtune.privacy.canaries import ClientCanaries, rehearse
from fedtune.privacy.example import example_privacy
from fedtune.privacy.plan import plan_of
from fedtune.round.watch import Watch
from fedtune.runs.folder import RunFolder, create_run
from fedtune.simulation.engines import ENGINES
from fedtune.training.canaries import GradientCanaries, InputCanaries
from fedtune.workflows.audited import Audited, AuditedClients, AuditedSteps, AuditedTexts, Room, spiked
from fedtune.workflows.setup import open_setup, require_trainable, run_facts, with_noise

Kind = Literal["gradient", "input"]
ATTACKERS = {
    "example": (
        "chooses gradients of some examples, knows all others, and sees the noisy gradient of every step "
        "of every update that left a client"
    ),
    "client": "chooses the updates of some clients, knows all others, and sees the model after every round",
    "input": (
        "puts mislabelled examples in, and asks the model at the start and at the "
        "end how likely it finds them"
    ),
}
"""Whom an audit plays, by the unit of the job and for input canaries."""


@dataclass(frozen=True)
class AuditReport:
    """What an audit found, and of what.

    Attributes:
        claimed: epsilon at outcome.delta that the job promises.
        seed: of the coins.
        rounds: in how many rounds a canary's client was asked, mean; None where that is not seen.
            charged: what the claim is for.
        expected, halved: the bound that such an audit shows of a mechanism that does what it promises, and of
            one with half of its noise; None for input canaries.
        best: the most that so many canaries could show, with the best number of guesses.
    """

    unit: str
    kind: Kind
    engine: str
    outcome: Outcome
    claimed: float
    seed: int
    rounds: float | None
    charged: int
    expected: float | None
    halved: float | None
    best: float
    notes: tuple[str, ...]

    @property
    def verdict(self) -> Literal["consistent", "VIOLATION"]:
        return "VIOLATION" if self.outcome.lower > self.claimed else "consistent"

    @property
    def attacker(self) -> str:
        return ATTACKERS["input" if self.kind == "input" else self.unit]

    def to_json(self) -> dict[str, Any]:
        found, own = self.outcome, asdict(self)
        del own["outcome"]
        return own | {
            "claimed": self.claimed if math.isfinite(self.claimed) else "inf",
            "delta": found.delta,
            "confidence": CONFIDENCE,
            "lower": found.lower,
            "canaries": found.canaries,
            "guesses": found.guesses,
            "made": found.made,
            "abstained": found.canaries - found.made,
            "correct": found.correct,
            "ceiling": found.ceiling,
            "attacker": self.attacker,
            "verdict": self.verdict,
        }

    def require_consistent(self) -> None:
        """Raises PrivacyRefused for a violation."""
        if self.verdict == "VIOLATION":
            raise PrivacyRefused(
                f"audit: epsilon is at least {self.outcome.lower:.4g} with {CONFIDENCE:.0%} confidence, "
                f"the job claims {self.claimed:.4g} at delta = {self.outcome.delta:g}; "
                "release nothing that this mechanism made, and mend it"
            )


def audit(
    job: Job,
    *,
    canaries: int = 0,
    guesses: int = 0,
    delta: float = 0.0,
    seed: int = 0,
    kind: Kind = "gradient",
    watch: Watch | None = None,
) -> AuditReport:
    """Runs the job once with canaries.

    Args:
        canaries, guesses: 0: as many as are useful.
        delta: where the bound and the claim are read; 0: the job's. The job's noise makes a claim at each,
            and a smaller one can show more.
        seed: of the coins and of where canaries are.

    Raises UserError for settings that cannot be audited, PrivacyRefused where the job's own are refused or
    no update left a client.
    """
    watch = watch or Watch()
    _require_auditable(job, kind)
    watch.stage("opening the base and the data", 0)
    setup = with_noise(open_setup(job), watch.note)
    require_trainable(setup)
    plan = plan_of(setup.job, len(setup.split.clients))
    assert plan is not None  # the job protects something
    delta, room = delta or plan.delta, Room(setup, plan, seed)
    claimed = read_epsilon(plan.whole(), delta).epsilon
    with_half = accuracy(*rehearse(room.view, shrink=0.5))
    count, tries = _planned(room, kind, canaries, guesses, with_half, delta)
    with tempfile.TemporaryDirectory(prefix="fedtune-audit-") as folder:
        simulation = _with_canaries(
            room, count, kind, create_run(Path(folder) / "run", setup.job, run_facts(setup)), watch
        )
        simulation.rounds()
    if not simulation.sent:
        raise PrivacyRefused(
            "audit: no update left any client "
            f"({next(iter(simulation.refused.values()), 'nobody was asked')}); there is nothing to audit"
        )
    placed, rounds = simulation.audit.canaries, simulation.audit.asked
    taken = take_guesses(simulation.audit.evidence, tries)
    outcome = Outcome(count, tries, int((taken != 0).sum()), count_right(taken, placed.coins), delta)
    asked = [rounds.get(placed.clients[owner], 0) for owner in placed.owner.tolist()] if rounds else []
    right, halved = (
        expected_bound(rehearsed, count, tries, delta) if kind == "gradient" else None
        for rehearsed in (accuracy(*rehearse(room.view)), with_half)
    )
    return AuditReport(
        plan.unit,
        kind,
        setup.job.simulation.engine,
        outcome,
        claimed,
        seed,
        float(np.mean(asked)) if asked else None,
        plan.rounds,
        right,
        halved,
        best_ceiling(count, delta),
        tuple(_notes(setup.job, outcome, claimed, halved, simulation)),
    )


def _require_auditable(job: Job, kind: Kind) -> None:
    if job.privacy.unit == "none":
        raise UserError(
            'privacy.unit = "none": such a job promises nothing, so there is nothing to audit; '
            'set it to "example" or "client"'
        )
    if job.units.varies:
        raise UserError(
            f'units.strategy = "{job.units.strategy}": not available yet for an audit, '
            'whose canaries keep their directions from round to round; use "all", "top", "bottom" or "both"'
        )
    if job.units.fit or set(budgets(job)) != {job.units.budget}:
        raise UserError(
            "simulation.devices: classes that train unlike numbers of blocks are not available yet for "
            "an audit, whose canaries have directions in what all train; remove units and units.fit"
        )
    if any(device.rank not in (0, job.adapter.rank) for device in job.simulation.devices):
        raise UserError(
            f"simulation.devices: ranks below adapter.rank = {job.adapter.rank} are not available yet for "
            "an audit, whose canaries have directions in what all train; remove them"
        )
    if not ENGINES[job.simulation.engine].inside:
        raise UserError(
            f'simulation.engine = "{job.simulation.engine}": an audit stands inside the process that trains; '
            'use "vectorised" or "serial"'
        )
    if job.adapter.init == "gradient-dp":
        raise UserError(
            'adapter.init = "gradient-dp": canaries are in the rounds, so what the first step\'s gradient '
            'loses would not be seen; audit the job with init = "weights"'
        )
    if kind == "input" and job.privacy.unit != "example":
        raise UserError(
            "--kind input: canaries are examples, but privacy.unit = "
            f'"{job.privacy.unit}"; use --kind gradient'
        )


def _planned(
    room: Room, kind: Kind, canaries: int, guesses: int, rehearsed: np.ndarray, delta: float
) -> tuple[int, int]:
    """(canaries, guesses): as asked for, or so that what was rehearsed, noise of half its size, would show
    best. Raises UserError for too many.
    """
    useful, most, why = (
        room.text_room()
        if kind == "input"
        else room.client_room()
        if room.plan.unit == "client"
        else room.example_room()
    )
    if not most:
        raise UserError(
            f"federation.cohort = {room.setup.job.federation.cohort}: with this seed nobody is asked in any "
            "round, so there is nothing to audit; raise it, or federation.rounds"
        )
    if canaries > most:
        raise UserError(f"--canaries {canaries}: at most {most:,}, as {why}; lower it, or leave it out")
    count = canaries or planned_canaries(rehearsed, useful, delta)
    if guesses > count:
        raise UserError(f"--guesses {guesses}: there are {count:,} canaries; lower it, or leave it out")
    return count, guesses or planned_guesses(rehearsed, count, delta)


def _with_canaries(room: Room, count: int, kind: Kind, run: RunFolder, watch: Watch) -> Audited:
    setup, private = room.setup, example_privacy(room.setup.job)
    if kind == "input":
        placed, data = room.texts(count)
        texts = InputCanaries(placed, data)
        return AuditedTexts(spiked(setup, texts.hide), run, watch, audit=texts)
    if private is None:
        return AuditedClients(
            setup,
            run,
            watch,
            audit=ClientCanaries(room.clients(count), room.directions, room.plan, room.view),
        )
    inside = GradientCanaries(room.examples(count), room.directions, private)
    return AuditedSteps(spiked(setup, inside.hide), run, watch, audit=inside)


def _notes(
    job: Job, outcome: Outcome, claimed: float, halved: float | None, simulation: Audited
) -> Iterator[str]:
    if job.privacy.noise == "seeded":
        yield (
            'privacy.noise = "seeded": such a run protects nobody; it is held against what noise '
            "of this size would promise"
        )
    steps = (
        ", or a job that takes everybody in each of a few steps at an epsilon of about "
        "2, which tries the same code"
    )
    if outcome.ceiling <= claimed:
        means = (
            f"a smaller --delta than {outcome.delta:g}"
            if outcome.canaries * outcome.delta > 0.1
            else "more canaries"
        )
        yield (
            f"no violation could have been shown: {outcome.guesses} guesses, all of them right, "
            f"prove {outcome.ceiling:.3g} at most; use {means}{steps}"
        )
    elif halved is not None and halved <= claimed:
        yield (
            "only a gross violation could have been shown: with half of the noise it would be about "
            f"{halved:.3g}; use more canaries{steps}"
        )
    if simulation.refused:
        client, why = next(iter(simulation.refused.items()))
        yield (
            f"{len(simulation.refused)} clients' updates did not leave or were not taken, "
            f"and were not seen: {client}: {why}"
        )
