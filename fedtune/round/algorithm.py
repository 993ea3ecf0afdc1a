"""From a job to the algorithm that every engine runs."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from fedtune.aggregation.rules import RULES, Average, Rule
from fedtune.algorithms import Algorithm, dp_fed_avg, fed_avg, secure_avg
from fedtune.algorithms.fed_avg import Draw
from fedtune.algorithms.server_optimizers import with_server_optimizer
from fedtune.algorithms.units import AS_THE_JOB, LimitsOf, ranked, selecting
from fedtune.common.seeds import generator
from fedtune.errors import JobError
from fedtune.job import Job, disagreements
from fedtune.privacy.client import client_privacy
from fedtune.privacy.contribution import secure_of
from fedtune.privacy.noise import noise_of
from fedtune.stateful.scaffold import steering
from fedtune.stateful.select import held_mean
from fedtune.types import ClientInfo, Update
from fedtune.wire import Schema


def make_algorithm(
    job: Job,
    schema: Schema,
    limits: LimitsOf = lambda client: AS_THE_JOB,
    population: int = 0,
    rule: Rule | None = None,
    draw: Draw | None = None,
) -> Algorithm:
    """The algorithm object that every engine runs.

    Args:
        limits: of each client.
        population: clients that could ever be asked (0: not known, then as many as a cohort has).
        rule: in place of the job's (`fedtune.aggregation.rules.own_rule` makes one of a function).
        draw: in place of the job's sampling.

    Raises JobError as `require_budgets`, for a rule that does not go with the rest of the job, and for a draw
    of one's own under privacy, which counts on how clients are drawn.
    """
    problems = list(disagreements(job, rule)) if rule else []
    if draw and job.privacy.unit == "client":
        problems.append(
            'privacy.unit = "client": counts on clients being drawn as federation.sampling says; '
            'leave out draw, or set it to "none"'
        )
    if rule and (used := _instead(job)):
        problems.append(
            f"{used}: takes the place of every rule; leave out the rule, or set it to its default"
        )
    if problems:
        raise JobError(problems)
    inner = with_server_optimizer(
        _averaging(job, schema, rule or RULES[job.federation.aggregation], draw), job.federation
    )
    if job.federation.drift == "scaffold":
        inner = steering(inner, population or job.federation.cohort)
    return selecting(ranked(inner, limits), job, schema, limits)


def _instead(job: Job) -> str:
    """The key of what averages in a way of its own, beside which no rule is asked; "" where there is none."""
    privacy = job.privacy
    ways = {
        "privacy.secure-aggregation = true": privacy.secure_aggregation,
        'privacy.unit = "client"': privacy.unit == "client",
        'personal.method = "select"': job.personal.method == "select",
    }
    return next((key for key, holds in ways.items() if holds), "")


def _averaging(job: Job, schema: Schema, rule: Rule, draw: Draw | None) -> Algorithm:
    fed, privacy, secure = job.federation, client_privacy(job), secure_of(job, schema)
    if secure is not None:
        return secure_avg(
            seed=fed.seed,
            cohort=fed.cohort,
            units=schema.units,
            draw=draw,
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
        average=_average(job, rule),
        draw=draw,
    )


def _average(job: Job, rule: Rule) -> Average:
    if job.personal.method == "select":
        return partial(held_mean, equal=job.federation.weighting == "equal")
    return rule.make(job.federation)


def require_kept_promises(
    job: Job, schema: Schema, clients: Sequence[ClientInfo], rule: Rule | None, draw: Draw | None
) -> None:
    """Tries a rule and a draw of a caller's own on a made-up first round. Raises what they raise there."""
    if draw is not None:
        draw(clients, 1, generator(job.federation.seed, "trial"))
    if rule is not None:
        algorithm = make_algorithm(job, schema, rule=rule)
        state = algorithm.init({t.name: np.zeros(t.shape, np.float32) for t in schema.tensors})
        names = [f"trial-{k}" for k in range(3)]
        first = algorithm.plan(state, [ClientInfo(name, 1) for name in names])
        trained = schema.of_units(first[0].units if first else schema.units)
        arrays = {t.name: state.arrays[t.name] for t in trained}
        algorithm.step(
            state,
            [Update(n, 1, {name: a + k for name, a in arrays.items()}, 1.0) for k, n in enumerate(names)],
        )
