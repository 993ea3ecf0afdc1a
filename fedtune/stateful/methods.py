"""Which method a job's clients follow: the one place that knows them all."""

from fedtune.job import Job
from fedtune.stateful.base import Method
from fedtune.stateful.ditto import DITTO
from fedtune.stateful.fed_per import FED_PER
from fedtune.stateful.fed_speed import FED_SPEED
from fedtune.stateful.loge import FED_LOGE
from fedtune.stateful.plain import PLAIN
from fedtune.stateful.scaffold import SCAFFOLD
from fedtune.stateful.select import FED_SELECT

METHODS = {m.name: m for m in (PLAIN, DITTO, FED_PER, FED_SELECT, FED_LOGE, SCAFFOLD, FED_SPEED)}
"""By the name that `personal.method` or `federation.drift` has."""


def method_of(job: Job) -> Method:
    """The method of the job's clients."""
    chosen = job.personal.method if job.personal.method != PLAIN.name else job.federation.drift
    return METHODS[chosen]
