"""The rules by which a round's updates become one: RULES names those that a job can choose.

To add one: its function in this folder, its line in RULES, and its name in the job's federation.aggregation.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedtune.aggregation import robust
from fedtune.aggregation.mean import Mean, weighted_mean
from fedtune.common.metrics import merge
from fedtune.types import Arrays, Update

Average = Callable[[Iterable[Update], Arrays], Mean]
"""(updates, model the round started from) -> what they make together. Reads its updates once, changes
neither, and raises EmptyCohort without any, ShapeMismatch as `weighted_mean`.
"""


@dataclass(frozen=True)
class Rule:
    """One rule, and what a job that chooses it can count on.

    Attributes:
        name: in federation.aggregation.
        make: (federation section) -> average.
        keys: of that section, which the rule needs above 0 and which no rule without them uses.
        sums: takes from updates no more than their weighted sum: secure sums, noise sized for a mean, and
            methods with a mean at their coordinator go with no other.
        alike: compares updates with each other, so that all clients must train the same numbers.
        streams: one update is in memory at a time; else all of a round.
        problems: (federation section) -> lines on what of it does not go with the rule.
    """

    name: str
    make: Callable[[Any], Average]
    keys: tuple[str, ...] = ()
    sums: bool = False
    alike: bool = True
    streams: bool = False
    problems: Callable[[Any], Iterable[str]] = lambda federation: ()


def own_rule(function: Callable[[Sequence[Update], Arrays], Mean | Arrays], name: str = "own") -> Rule:
    """A caller's function as a rule, of which nothing is known. It is given all updates, and gives a Mean, or
    arrays by name, which then count as of all updates; the tensors that it leaves out stay.
    """

    def average(updates: Iterable[Update], reference: Arrays) -> Mean:
        came = robust.require_updates(updates, reference)
        found = function(came, reference)
        if isinstance(found, Mean):
            return found
        clients = tuple(update.client for update in came)
        metrics = merge([update.metrics for update in came])
        return Mean({**reference, **found}, clients, float(len(came)), metrics)

    return Rule(name, lambda federation: average)


def _too_many_wrong(federation: Any) -> Iterator[str]:
    if 2 * federation.byzantine + 2 >= federation.cohort:
        yield (
            f"federation.byzantine = {federation.byzantine}: krum needs more than 2 f + 2 updates, and "
            f"federation.cohort = {federation.cohort}; "
            f"lower it to {max(0, (federation.cohort - 3) // 2)}, or raise cohort"
        )


MEAN = Rule(
    "mean",
    lambda federation: partial(weighted_mean, equal=federation.weighting == "equal"),
    sums=True,
    alike=False,
    streams=True,
)
RULES = {
    rule.name: rule
    for rule in (
        MEAN,
        Rule("median", lambda federation: robust.median),
        Rule(
            "trimmed-mean",
            lambda federation: partial(robust.trimmed_mean, share=federation.trim),
            keys=("trim",),
        ),
        Rule(
            "krum",
            lambda federation: partial(robust.krum, wrong=federation.byzantine),
            keys=("byzantine",),
            problems=_too_many_wrong,
        ),
        Rule(
            "multi-krum",
            lambda federation: partial(robust.krum, wrong=federation.byzantine, several=True),
            keys=("byzantine",),
            problems=_too_many_wrong,
        ),
        Rule(
            "norm-bound",
            lambda federation: partial(robust.norm_bound, bound=federation.norm_bound),
            keys=("norm_bound",),
        ),
    )
}
