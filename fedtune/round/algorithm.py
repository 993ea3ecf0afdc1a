"""From a job to the algorithm that every engine runs."""

from collections.abc import Callable, Iterable
from functools import partial

from fedtune.aggregation import robust
from fedtune.aggregation.mean import Mean
from fedtune.algorithms import Algorithm, dp_fed_avg, fed_avg, secure_avg
from fedtune.algorithms.server_optimizers import with_server_optimizer
from fedtune.algorithms.units import AS_THE_JOB, LimitsOf, ranked, selecting
from fedtune.job import Job
from fedtune.privacy.client import client_privacy
from fedtune.privacy.contribution import secure_of
from fedtune.privacy.noise import noise_of
from fedtune.stateful.scaffold import steering
from fedtune.stateful.select import held_mean
from fedtune.types import Arrays, Update
from fedtune.wire import Schema


def make_algorithm(
    job: Job, schema: Schema, limits: LimitsOf = lambda client: AS_THE_JOB, population: int = 0
) -> Algorithm:
    """The algorithm object that every engine runs. limits: of each client. population: clients that could
    ever be asked (0: not known, then as many as a cohort has). Raises JobError as `require_budgets`.
    """
    inner = with_server_optimizer(_averaging(job, schema), job.federation)
    if job.federation.drift == "scaffold":
        inner = steering(inner, population or job.federation.cohort)
    return selecting(ranked(inner, limits), job, schema, limits)


def _averaging(job: Job, schema: Schema) -> Algorithm:
    fed, privacy, secure = job.federation, client_privacy(job), secure_of(job, schema)
    if secure is not None:
        return secure_avg(
            seed=fed.seed,
            cohort=fed.cohort,
            units=schema.units,
            secure=secure,
            noise=lambda round, client: noise_of(job, round, client, "sum"),
        )
    if privacy is not None:
        return dp_fed_avg(
            seed=fed.seed,
            cohort=fed.cohort,
            units=schema.units,
            sampling=fed.sampling,
            privacy=privacy,
            noise=lambda round: noise_of(job, round, ""),
            secret=job.privacy.amplification and job.privacy.noise == "system",
        )
    return fed_avg(
        seed=fed.seed,
        cohort=fed.cohort,
        units=schema.units,
        sampling=fed.sampling,
        weighting=fed.weighting,
        average=_average(job),
    )


def _average(job: Job) -> Callable[[Iterable[Update], Arrays], Mean] | None:
    """What stands in the place of the mean."""
    fed = job.federation
    if job.personal.method == "select":
        return partial(held_mean, equal=fed.weighting == "equal")
    rules: dict[str, Callable[[Iterable[Update], Arrays], Mean]] = {
        "median": robust.median,
        "trimmed-mean": lambda updates, reference: robust.trimmed_mean(updates, reference, fed.trim),
        "krum": lambda updates, reference: robust.krum(updates, reference, fed.byzantine),
        "multi-krum": lambda updates, reference: robust.krum(updates, reference, fed.byzantine, several=True),
        "norm-bound": lambda updates, reference: robust.norm_bound(updates, reference, fed.norm_bound),
    }
    return rules.get(fed.aggregation)
