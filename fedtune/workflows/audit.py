"""fedtune privacy audit: the job is run with canaries in it, and what they prove is held against what the job claims.

The run is a real one, in a folder that is thrown away. Like every other run on the same data it would cost privacy if its model or the
audit's figures were given to others.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedtune.errors import PrivacyRefused, UserError
from fedtune.job import Job
from fedtune.privacy.audit import (
    CONFIDENCE,
    LARGEST,
    Outcome,
    best_ceiling,
    count_right,
    expected_bound,
    gaussian_mu,
    planned_guesses,
    take_guesses,
)
from fedtune.privacy.canaries import Canaries
from fedtune.privacy.canary_clients import ClientCanaries
from fedtune.privacy.example import example_privacy
from fedtune.privacy.plan import Plan, plan_of
from fedtune.rounds import Watch
from fedtune.run import RunFolder, create_run
from fedtune.training.canaries import GradientCanaries, InputCanaries
from fedtune.workflows.audited import Audited, AuditedClients, AuditedSteps, AuditedTexts, spiked
from fedtune.workflows.canaries import among_clients, among_examples, among_texts
from fedtune.workflows.setup import Setup, open_setup, require_trainable, run_facts, with_noise

Kind = Literal["gradient", "input"]
ATTACKERS = {
    "example": "chooses gradients of examples, and sees the noisy gradient of every step of every update that left a client",
    "client": "chooses whole updates of clients, and sees the model after every round",
    "input": "puts mislabelled examples in, and asks the model at the start and at the end how likely it finds them",
}
"""Whom an audit plays, by the unit of the job and for input canaries."""


@dataclass(frozen=True)
class Report:
    """What an audit found, and of what.

    Attributes:
        claimed: epsilon at outcome.delta that the job promises.
        seed: of the coins.
        rounds: in how many rounds a canary's client was asked, mean; None where that is not seen. charged: what the claim is for.
        expected: the bound of a mechanism that loses just what is claimed, as a Gaussian one with these canaries would show it.
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
    expected: float
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
            "claimed": self.claimed if math.isfinite(self.claimed) else "inf", "delta": found.delta, "confidence": CONFIDENCE, "lower": found.lower,
            "canaries": found.canaries, "guesses": found.guesses, "made": found.made, "abstained": found.canaries - found.made, "correct": found.correct,
            "ceiling": found.ceiling, "attacker": self.attacker, "verdict": self.verdict,
        }

    def require_consistent(self) -> None:
        """Raises PrivacyRefused for a violation."""
        if self.verdict == "VIOLATION":
            raise PrivacyRefused(
                f"audit: epsilon is at least {self.outcome.lower:.4g} with {CONFIDENCE:.0%} confidence, the job claims {self.claimed:.4g} at delta = {self.outcome.delta:g}; "
                "release nothing that this mechanism made, and mend it")


def audit(job: Job, *, canaries: int = 0, guesses: int = 0, seed: int = 0, kind: Kind = "gradient", watch: Watch | None = None) -> Report:
    """Runs the job once with canaries.

    Args:
        canaries, guesses: 0: as many as are useful.
        seed: of the coins and of where canaries are.

    Raises UserError for settings that cannot be audited, PrivacyRefused where the job's own are refused or no update left a client.
    """
    watch = watch or Watch()
    _require_auditable(job, kind)
    watch.stage("opening the base and the data", 0)
    setup = with_noise(open_setup(job), watch.note)
    require_trainable(setup)
    plan = plan_of(setup.job, len(setup.split.clients))
    assert plan is not None  # the job protects something
    claimed = plan.reading().epsilon
    with tempfile.TemporaryDirectory(prefix="fedtune-audit-") as folder:
        run = create_run(Path(folder) / "run", setup.job, run_facts(setup))
        placed, simulation = _with_canaries(setup, plan, run, kind, canaries, seed, watch)
        count = _guesses(guesses, len(placed), claimed, plan.delta)  # before anything has run: looking first would prove nothing
        simulation.rounds()
    if not simulation.sent:
        raise PrivacyRefused(f"audit: no update left any client ({next(iter(simulation.refused.values()), 'nobody was asked')}); there is nothing to audit")
    taken = take_guesses(simulation.evidence, count)
    outcome = Outcome(len(placed), count, int((taken != 0).sum()), count_right(taken, placed.coins), plan.delta)
    asked = [simulation.asked.get(placed.clients[owner], 0) for owner in placed.owner.tolist()] if simulation.asked else []
    return Report(
        plan.unit, kind, setup.job.simulation.engine, outcome, claimed, seed, float(np.mean(asked)) if asked else None, plan.rounds,
        _expected(outcome, claimed), best_ceiling(len(placed), plan.delta), tuple(_notes(setup.job, outcome, claimed, simulation)))


def _require_auditable(job: Job, kind: Kind) -> None:
    if job.privacy.unit == "none":
        raise UserError('privacy.unit = "none": such a job promises nothing, so there is nothing to audit; set it to "example" or "client"')
    if job.simulation.engine == "ray":
        raise UserError('simulation.engine = "ray": an audit stands inside the process that trains; use "vectorised" or "serial"')
    if kind == "input" and job.privacy.unit != "example":
        raise UserError(f'--kind input: canaries are examples, but privacy.unit = "{job.privacy.unit}"; use --kind gradient')


def _with_canaries(setup: Setup, plan: Plan, run: RunFolder, kind: Kind, count: int, seed: int, watch: Watch) -> tuple[Canaries, Audited]:
    if kind == "input":
        placed, data = among_texts(setup, plan, count, seed)
        texts = InputCanaries(placed, data)
        return placed, AuditedTexts(spiked(setup, texts.hide), run, watch, audit=texts)
    if plan.unit == "client":
        placed, directions = among_clients(setup, plan, count, seed)
        return placed, AuditedClients(setup, run, watch, audit=ClientCanaries(placed, directions, plan))
    placed, directions = among_examples(setup, plan, count, seed)
    private = example_privacy(setup.job)
    assert private is not None  # the unit is "example"
    inside = GradientCanaries(placed, directions, private)
    return placed, AuditedSteps(spiked(setup, inside.hide), run, watch, audit=inside)


def _guesses(asked: int, canaries: int, claimed: float, delta: float) -> int:
    if asked > canaries:
        raise UserError(f"--guesses {asked}: there are {canaries:,} canaries; lower it, or leave it out")
    return asked or planned_guesses(canaries, claimed, delta)


def _expected(outcome: Outcome, claimed: float) -> float:
    return expected_bound(outcome.canaries, outcome.guesses, gaussian_mu(min(claimed, LARGEST), outcome.delta), outcome.delta)


def _notes(job: Job, outcome: Outcome, claimed: float, simulation: Audited) -> Iterator[str]:
    if job.privacy.noise == "seeded":
        yield 'privacy.noise = "seeded": such a run protects nobody; it is held against what noise of this size would promise'
    if outcome.ceiling <= claimed:
        yield f"no violation could have been shown: {outcome.guesses} right guesses out of as many prove {outcome.ceiling:.3g} at most; use more canaries, or a job with a smaller epsilon"
    if simulation.refused:
        client, why = next(iter(simulation.refused.items()))
        yield f"{len(simulation.refused)} clients' updates did not leave or were not taken, and were not seen: {client}: {why}"
