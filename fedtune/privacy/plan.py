"""From a job to what each of its rounds releases, and to the noise that keeps its promise."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.common.metrics import value
from fedtune.errors import PrivacyRefused
from fedtune.job import Job
from fedtune.privacy.accounting import Reading, read_epsilon
from fedtune.privacy.calibration import calibrate
from fedtune.privacy.distributed import excess
from fedtune.privacy.releases import History, Release, Sampling, history
from fedtune.secagg.graph import design
from fedtune.types import Metrics

METRIC_CAP = 10.0
"""Loss of one example, or mean loss of one client, above which a metric counts it as this."""
BITS = 10.0
"""Multiplier of the clip bits over that of the update, unless the job says otherwise:
they then add half a percent to 1 / z^2.
"""
DANGEROUS = 10.0
"""Epsilon above which a job has to say that it is meant."""
FEW = 100
"""Clients below which client-level noise drowns the mean."""


@dataclass(frozen=True)
class PrivacyPlan:
    """What a protected run releases. All of it is public: nothing here may come from the data.

    Attributes:
        population: clients that may be drawn (client level).
        delta: of the promise.
        parts: what leaves at once, with the noise multiplier of each.
    """

    job: Job
    population: int
    delta: float
    parts: dict[str, float]

    @property
    def unit(self) -> str:
        return self.job.privacy.unit

    @property
    def steps(self) -> int:
        """Uses of the mechanism in one round."""
        return local_steps(self.job) if self.unit == "example" else 1

    @property
    def rounds(self) -> int:
        """The most rounds that one unit's data may be in."""
        if self._amplified:
            # every client may be in every round: that is what the sampling pays for
            return self.job.federation.rounds
        return min(self.job.privacy.participations or self.job.federation.rounds, self.job.federation.rounds)

    @property
    def budget(self) -> int:
        """Rounds after which a client's budget is spent, and it is not asked again;
        0: the run ends before.
        """
        return 0 if self._amplified or self.rounds == self.job.federation.rounds else self.rounds

    @property
    def _amplified(self) -> bool:
        return self.unit == "client" and self.job.privacy.amplification

    @property
    def distributed(self) -> bool:
        """Whether each client adds its share of the noise itself."""
        return self.unit == "client" and self.job.privacy.secure_aggregation

    def release(self, clients: Sequence[str], clip: float = 0.0) -> Release:
        """The event of one round with these clients; `clip`: as adapted, where it is not the job's."""
        privacy, fed = self.job.privacy, self.job.federation
        sampling: Sampling = "poisson" if self.unit == "example" else "none"
        rate, sample, population = sampling_rate(self.job) if self.unit == "example" else 1.0, 0, 0
        if self._amplified:
            sampling, population = fed.sampling, self.population
            rate, sample = (
                (min(1.0, fed.cohort / self.population), 0)
                if sampling == "poisson"
                else (1.0, min(fed.cohort, self.population))
            )
            population = 0 if sampling == "poisson" else population
        return Release(
            release="updates",
            mechanism="distributed" if self.distributed else "gaussian",
            unit=privacy.unit,
            clients=[] if self._amplified else list(clients),
            noise=privacy.noise,
            parts=self.parts,
            clip=clip or privacy.clip,
            sampling=sampling,
            rate=rate,
            sample=sample,
            population=population,
            count=self.steps,
            excess=excess(self.parts["update"], fewest(self.job)) if self.distributed else 0.0,
        )

    def gradients(self, clients: Sequence[str]) -> Release | None:
        """The event of the first step's gradient, from these clients; None where the frame is made without.

        Example level: one step of DP-SGD that moves nothing. Client level:
        nothing is claimed for not having been drawn.
        """
        if self.job.adapter.init != "gradient-dp":
            return None
        sampling: Sampling = "poisson" if self.unit == "example" else "none"
        return Release(
            release="gradients",
            mechanism="gaussian",
            unit=self.job.privacy.unit,
            clients=list(clients),
            noise=self.job.privacy.noise,
            parts={"init": self.init_noise},
            clip=init_clip(self.job),
            sampling=sampling,
            rate=init_batch(self.job)[1] if sampling == "poisson" else 1.0,
        )

    @property
    def init_noise(self) -> float:
        """Multiplier of the first step's gradient."""
        return self.job.privacy.init_noise or self.parts["update"]

    def whole(self) -> History:
        """Of a unit that is in all that it may be in."""
        first = self.gradients(["one"])
        return history([*([first] if first else []), *[self.release(["one"])] * self.rounds])

    def reading(self, accountants: Sequence[str] = ("pld", "rdp")) -> Reading:
        """The most that one unit can be charged."""
        return read_epsilon(self.whole(), self.delta, accountants)


def fewest(job: Job) -> int:
    """Clients that must be in a round's mean for it to count.

    In a secure sum the design's threshold: with fewer it does not open.

    Raises PrivacyRefused for a cohort that no design holds.
    """
    if job.privacy.secure_aggregation:
        try:
            return design(job.federation.cohort).threshold
        except ValueError as e:
            raise PrivacyRefused(
                f"federation.cohort = {job.federation.cohort}: secure aggregation of {e}"
            ) from None
    # there a void round would tell who took part
    return 0 if job.privacy.unit == "client" else job.federation.min_replies


def noise_multiplier(job: Job) -> float:
    """Of a protected job that was `resolved`. Raises PrivacyRefused for one that was not."""
    if not job.privacy.noise_multiplier:
        raise PrivacyRefused(
            "privacy.noise-multiplier = 0: was not computed before the rounds began, "
            "so nothing would be protected"
        )
    return job.privacy.noise_multiplier


def local_steps(job: Job) -> int:
    """Optimizer steps of a client in a round of example-level privacy:
    from public numbers, not from its data.
    """
    fed = job.federation
    epochs = fed.local_epochs * math.ceil(job.privacy.examples / fed.batch_size)
    return min(fed.local_steps, epochs) if fed.local_steps else epochs


def sampling_rate(job: Job) -> float:
    """Chance of an example to be in a step's batch."""
    return min(1.0, job.federation.batch_size / job.privacy.examples)


def init_clip(job: Job) -> float:
    """L2 bound of a gradient of the first step over all adapted weights."""
    return job.privacy.init_clip or job.privacy.clip


def init_batch(job: Job) -> tuple[float, float]:
    """(examples of a client expected in the first step's gradient,
    chance of each to be in it), from public numbers.
    """
    expected = min(job.adapter.init_examples, job.privacy.examples)
    return float(expected), expected / job.privacy.examples


def units(job: Job, population: int) -> int:
    """How many there are of what is protected, against which delta has to be small."""
    return job.privacy.examples if job.privacy.unit == "example" else population


def default_delta(count: int) -> float:
    """count ** -1.1, to one digit downwards: below 1 / count.

    >>> default_delta(1000)
    0.0005
    """
    exact = count**-1.1
    unit = 10.0 ** math.floor(math.log10(exact))
    return float(f"{math.floor(exact / unit + 1e-9) * unit:.0e}")


def plan_of(job: Job, population: int) -> PrivacyPlan | None:
    """The plan of a job, its noise calibrated where the job gives an epsilon;
    None where the job protects nothing.

    Args:
        population: clients that may be drawn; 0 where nobody knows yet, which only client level needs.

    Raises PrivacyRefused for settings that claim more than they give.
    """
    privacy = job.privacy
    if privacy.unit == "none":
        return None
    count = units(job, population)
    if not privacy.delta and not count:
        raise PrivacyRefused(
            "privacy.delta = 0: how many devices there will be is not known yet; "
            "give a delta below 1 / their number"
        )
    delta = privacy.delta or default_delta(max(2, count))
    if count and delta >= 1 / count:
        raise PrivacyRefused(
            f"privacy.delta = {delta:g}: with {count} {privacy.unit}s it must be below {1 / count:.2g}, "
            f"or giving away one whole {privacy.unit} would count as private; "
            f"lower it, {default_delta(count):g} would do"
        )

    def made(z: float) -> PrivacyPlan:
        return PrivacyPlan(job, population, delta, _parts(job, z))

    plan = made(privacy.noise_multiplier or calibrate(lambda z: made(z).whole(), privacy.epsilon, delta))
    epsilon = plan.reading().epsilon
    if privacy.epsilon and epsilon > privacy.epsilon:
        raise PrivacyRefused(
            f"privacy.noise-multiplier = {privacy.noise_multiplier:g}: gives epsilon = {epsilon:.4g}, "
            f"the job promises {privacy.epsilon:g}; leave out one of the two keys"
        )
    if epsilon > DANGEROUS and not privacy.i_understand:
        raise PrivacyRefused(
            f"privacy.epsilon: this run's is {epsilon:.3g}, above {DANGEROUS:g}, which protects little; "
            "add noise, or say that you mean it with --i-understand"
        )
    return plan


def kept(job: Job, population: int) -> PrivacyPlan | None:
    """The plan of a job that a run keeps, whose noise and delta were filled in when it began: nothing is
    worked out or refused again.
    """
    privacy = job.privacy
    if privacy.unit == "none" or not (privacy.noise_multiplier and privacy.delta):
        return plan_of(job, population)
    return PrivacyPlan(job, population, privacy.delta, _parts(job, privacy.noise_multiplier))


def resolved(job: Job, population: int) -> Job:
    """The job with what its privacy keys leave open filled in, so that all who read it hold the same numbers.

    Raises PrivacyRefused.
    """
    plan = plan_of(job, population)
    if plan is None:
        return job
    found = {"delta": plan.delta, "noise_multiplier": plan.parts["update"]}
    if plan.gradients([]):
        found |= {"init_noise": plan.init_noise, "init_clip": init_clip(job)}
    return job.model_copy(update={"privacy": job.privacy.model_copy(update=found)})


def outward(job: Job, examples: int, metrics: Metrics) -> tuple[float, Metrics]:
    """(weight, metrics) of an update as they may leave a client.

    Under privacy nothing tells how many examples it holds.
    """
    if job.privacy.unit == "none":
        # under secure aggregation they go no further than the device's own part that makes its vector
        return float(examples), metrics
    if job.privacy.unit == "example":
        return 1.0, metrics  # which hold noise already
    if not job.privacy.metrics_noise:
        return 1.0, {}
    loss, right = bounded_scores(metrics).tolist()
    return 1.0, scored(loss, right, 1.0)


def bounded_scores(metrics: Metrics) -> np.ndarray:
    """float64 [2]: (mean loss over METRIC_CAP, accuracy), each within [0, 1];
    zeros where nothing was counted.
    """
    means = [value(metrics, name) for name in ("loss", "accuracy")]
    return np.clip(np.nan_to_num(means, nan=0.0) / [METRIC_CAP, 1.0], 0.0, 1.0)


def scored(loss: float, accuracy: float, count: float) -> Metrics:
    """The reverse: metrics over `count` clients with these means of `bounded_scores`."""
    return {"loss": (METRIC_CAP * loss * count, count), "accuracy": (accuracy * count, count)}


def warnings_of(plan: PrivacyPlan) -> Iterator[str]:
    """What the one who starts the job should know."""
    privacy, fed = plan.job.privacy, plan.job.federation
    if privacy.noise == "seeded":
        yield (
            'privacy.noise = "seeded": noise from a known seed protects nobody; '
            "every reading of this run is infinite"
        )
    if plan.unit == "client" and plan.population < FEW:
        more = math.sqrt(fed.cohort / fewest(plan.job)) if plan.distributed else 1.0
        yield (
            f"{plan.population} clients: the noise of client-level privacy "
            f"is {more * plan.parts['update'] * privacy.clip / fed.cohort:.2g} in each number of the mean "
            f"of {fed.cohort} updates, "
            f"each of L2 norm at most {privacy.clip:g}; with so few, protect examples "
            '(privacy.unit = "example")'
        )
    if plan.unit == "example" and privacy.examples < 10 * fed.batch_size:
        yield (
            f"privacy.examples = {privacy.examples}: batches of {fed.batch_size} are "
            f"{100 * sampling_rate(plan.job):.0f} % of it, so sampling hides little; "
            "smaller batches need less noise"
        )


def _parts(job: Job, z: float) -> dict[str, float]:
    privacy = job.privacy
    parts = {"update": z}
    if privacy.adaptive_clip:
        parts["clip-bits"] = 2 * privacy.clip_noise if privacy.clip_noise else BITS * z
    if privacy.metrics_noise:
        parts["metrics"] = privacy.metrics_noise
    return parts
