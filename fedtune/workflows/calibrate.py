"""fedtune privacy calibrate: which noise an epsilon needs, which epsilon a noise gives, and what is left of
the signal. Nothing is run.

Signal to noise, per part of the adapter with n numbers and a noise multiplier z: the clip, which is the most
that the mean of clipped contributions can measure (all of them equal, and all of it in that part), over the
L2 norm of the noise in that part,

    example level, one optimizer step of a client:  C / (z C sqrt(n) / batch-size) = batch-size / (z sqrt(n))
    client level, one round:                        C / (z C sqrt(n) / cohort)     = cohort / (z sqrt(n))

so the clip C cancels. Above 1 a step can point somewhere; below, it is noise that only many steps
average away. It is a ceiling of the signal and no prediction of accuracy: real contributions differ,
and spread over all parts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.adapters.kinds.table import METHODS
from fedtune.adapters.spec import AdapterSpec
from fedtune.errors import EnvironmentProblem, PrivacyRefused, UserError
from fedtune.job import Job, job_from, load_raw
from fedtune.privacy.plan import PrivacyPlan, plan_of, warnings_of
from fedtune.round.gradient_init import init_warnings
from fedtune.tasks import task_named
from fedtune.types import TensorSpec
from fedtune.workflows.privacy import figure

EPSILONS = (1.0, 3.0, 10.0)
"""Answered when nothing is asked, beside the job's own."""
DEFINITION = {
    "example": "signal to noise: at most what one step's mean clipped gradient can measure (the clip) "
    "over the L2 norm of its noise in that part (z x clip x sqrt(numbers) / batch-size). "
    "A ceiling of the signal, no prediction of accuracy.",
    "client": "signal to noise: at most what one round's mean clipped update can measure (the clip) "
    "over the L2 norm of its noise in that part (z x clip x sqrt(numbers) / cohort). "
    "A ceiling of the signal, no prediction of accuracy.",
}


@dataclass(frozen=True)
class Part:
    """`count` parts of the adapter that hold `numbers` trained numbers each."""

    name: str
    count: int
    numbers: int


@dataclass(frozen=True)
class Row:
    """What one noise multiplier gives; `asked` is what it answers.

    `readings`: epsilon by accountant, `epsilon` the smallest.

    `rounds` a unit may be in, with `steps` uses of the noise in all, each of which takes a unit with chance
    `rate`. `signal_to_noise` is by part, as at the head of this module.
    """

    asked: str
    amplification: bool
    noise_multiplier: float
    epsilon: float | str
    readings: dict[str, float | str]
    delta: float
    rounds: int
    steps: int
    sampling: str
    rate: float
    signal_to_noise: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """`rows` of the job's own sampling come first."""

    unit: str
    units: int
    rows: tuple[Row, ...]
    parts: tuple[Part, ...]
    definition: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_job(path: Path | None, overrides: Sequence[str] = ()) -> Job:
    """A job for `calibrate`, which needs neither a clip nor an epsilon yet:
    those the job lacks are filled in. Raises UserErrors.
    """
    raw, source = load_raw(path, overrides)
    privacy = raw.get("privacy", {})
    if not isinstance(privacy, dict) or privacy.get("unit", "none") == "none":
        job_from(raw, source)
        raise UserError(
            'privacy.unit = "none": there is nothing to calibrate; say what to protect: '
            "--set privacy.unit=example --set privacy.examples=N, or --set privacy.unit=client"
        )
    federation = raw.setdefault("federation", {})
    if isinstance(federation, dict):
        federation.setdefault("weighting", "equal")
    if not any(privacy.get(key) for key in ("epsilon", "noise-multiplier", "noise_multiplier")):
        privacy["epsilon"] = EPSILONS[0]
    privacy["clip"] = privacy.get("clip") or 1.0
    return job_from(raw, source)


def make_calibration(job: Job, epsilons: Sequence[float] = (), noises: Sequence[float] = ()) -> Calibration:
    """Answers for these epsilons and noise multipliers; for none, those of the job and EPSILONS.

    Client level without secure aggregation is answered with and without amplification; the job's own way is
    checked as a run would be.

    Raises PrivacyRefused for a delta that is too large, and for an epsilon above 10 unless the
    job says that it is meant.
    """
    if job.privacy.unit == "client" and not job.data.clients:
        raise UserError(
            "data.clients = 0: how many clients there are decides about delta and sampling; give --clients N"
        )
    spec, notes = _shapes(job)
    parts = adapter_parts(job, spec)
    jobs = list(_asked(job, epsilons, noises))
    plans = [(text, _plan(one)) for text, one in jobs]
    rows, other = [_row(text, plan, parts) for text, plan in plans], []
    # no accountant reads distributed noise with amplification
    if job.privacy.unit == "client" and not job.privacy.secure_aggregation:
        for text, one in jobs:
            try:
                other.append(_row(text, _plan(_turned(one)), parts))
            except PrivacyRefused as e:
                notes.append(f"{'without' if job.privacy.amplification else 'with'} amplification: {e}")
    gentlest = min((plan for _, plan in plans), key=lambda plan: plan.parts["update"])
    count = job.privacy.examples if job.privacy.unit == "example" else job.data.clients
    return Calibration(
        job.privacy.unit,
        count,
        (*rows, *other),
        parts,
        DEFINITION[job.privacy.unit],
        (*warnings_of(gentlest), *(init_warnings(spec, gentlest) if spec else ())),
        tuple(notes),
    )


def _asked(job: Job, epsilons: Sequence[float], noises: Sequence[float]) -> Iterator[tuple[str, Job]]:
    """(what is asked, the job that says so)."""
    for name, values in (("--epsilon", epsilons), ("--noise", noises)):
        for value in values:
            if not 0 < value < math.inf:
                raise UserError(f"{name} {value:g}: must be a number above 0")
    own = job.privacy
    if not epsilons and not noises:
        epsilons = sorted({*EPSILONS, own.epsilon} - {0.0})
        noises = [own.noise_multiplier] if own.noise_multiplier else []
    for epsilon in epsilons:
        yield f"epsilon {epsilon:g}", _with(job, epsilon=epsilon, noise_multiplier=0.0)
    for noise in noises:
        yield f"noise {noise:g}", _with(job, epsilon=0.0, noise_multiplier=noise)


def _with(job: Job, **changes: Any) -> Job:
    return job.model_copy(update={"privacy": job.privacy.model_copy(update=changes)})


def _turned(job: Job) -> Job:
    """The same with amplification where it had none, and the other way round; for comparison,
    so nothing of it is refused.
    """
    return _with(job, amplification=not job.privacy.amplification, participations=0, i_understand=True)


def _plan(job: Job) -> PrivacyPlan:
    plan = plan_of(job, job.data.clients)
    assert plan is not None, "read_job asks for a unit"
    return plan


def _row(asked: str, plan: PrivacyPlan, parts: Sequence[Part]) -> Row:
    release, reading, job = plan.release(["one"]), plan.reading(), plan.job
    z, many = (
        plan.parts["update"],
        job.federation.batch_size if plan.unit == "example" else job.federation.cohort,
    )
    seeded = job.privacy.noise == "seeded"
    rate = release.sample / release.population if release.sampling == "fixed" else release.rate
    return Row(
        asked,
        job.privacy.amplification,
        z,
        "inf" if seeded else figure(reading.epsilon),
        {name: "inf" if seeded else figure(value) for name, value in reading.by},
        plan.delta,
        plan.rounds,
        plan.rounds * plan.steps,
        release.sampling,
        rate,
        {part.name: many / (z * math.sqrt(part.numbers)) for part in parts},
    )


def _shapes(job: Job) -> tuple[AdapterSpec | None, list[str]]:
    """(the spec, notes), from the base's config; None without that."""
    try:
        return _spec(job)
    except (UserError, EnvironmentProblem, ModuleNotFoundError) as e:
        lacking = "" if METHODS[job.adapter.method].cores else ", so no signal to noise can be given"
        return None, [f"the shapes of the base are not known ({str(e).splitlines()[0]}){lacking}"]


def adapter_parts(job: Job, spec: AdapterSpec | None) -> tuple[Part, ...]:
    """The adapter as a whole, its units and its cores; without a spec,
    one core where its rank says its size.
    """
    if spec is None:
        return (Part("each core", 1, job.adapter.rank**2),) if METHODS[job.adapter.method].cores else ()
    if not spec.size:
        return ()
    units: dict[str, int] = {}
    for t in spec.trainable:
        units[t.unit] = units.get(t.unit, 0) + t.size
    found = [Part("the whole adapter", 1, spec.size), *_alike(units)]
    if METHODS[spec.method].cores:
        found.append(Part("each core", len(spec.linears), spec.rank**2))
    return tuple(found)


def _alike(units: dict[str, int]) -> Iterator[Part]:
    """Units of one size as one part."""
    for size in dict.fromkeys(units.values()):
        names = [name for name, numbers in units.items() if numbers == size]
        yield Part(names[0] if len(names) == 1 else f"each of {names[0]} to {names[-1]}", len(names), size)


def _spec(job: Job) -> tuple[AdapterSpec, list[str]]:
    from fedtune.algorithms.units import spec_of  # here, so that the figures without shapes need no torch
    from fedtune.data.examples import load_dataset
    from fedtune.models.base import layout
    from fedtune.models.load import sketch_model
    from fedtune.models.sources import locate

    source, classes, notes = locate(job.model.source), len(job.data.labels), []
    if not task_named(job.model.task).has_head:
        classes = 1
    elif not classes:
        try:
            classes = len(load_dataset(job.data, job.model, job.federation.seed).label_names)
        except (UserError, EnvironmentProblem) as e:
            notes.append(
                f"the head is left out, as the labels are not known ({e}); name data.labels in the job"
            )
    spec = spec_of(layout(sketch_model(job.model, source, max(1, classes))), job)
    return (spec, notes) if classes else (without_head(spec), notes)


def without_head(spec: AdapterSpec) -> AdapterSpec:
    trainable: tuple[TensorSpec, ...] = tuple(t for t in spec.trainable if t.unit != "head")
    return replace(spec, trainable=trainable)
