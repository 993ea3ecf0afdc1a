"""What a check between keys is, and how checks are put together.

A check is a function of a job that gives a line for each problem it finds. It may be asked of a job that
lacks the keys that are not valid themselves: it then ends, without a word more, where it reads one of them.
So a check is as small as it can be, and what it does not need it does not read.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from fedtune.job.sections import DeviceClass, MissingKey, Section, Sections
from fedtune.job.text import or_, toml_value

Check = Callable[[Sections], Iterator[str]]
ClassCheck = Callable[[Sections, int, DeviceClass], Iterator[str]]
"""A check of one class of devices, with its place among them."""


def problems(checks: Iterable[Check], job: Sections) -> Iterator[str]:
    """The lines of all checks, in their order."""
    for check in checks:
        with suppress(MissingKey):
            yield from check(job)


def when(holds: Callable[[Sections], object], *checks: Check) -> Check:
    """These checks as one, for jobs of which this holds."""

    def check(job: Sections) -> Iterator[str]:
        if holds(job):
            yield from problems(checks, job)

    return check


def of_each_class(check: ClassCheck) -> Check:
    def of_all(job: Sections) -> Iterator[str]:
        for place, device in enumerate(job.simulation.devices):
            with suppress(MissingKey):
                yield from check(job, place, device)

    return of_all


def idle(name: str, choice: str, key: str, choices: tuple[str, ...]) -> Check:
    """A key of the section that was changed although its choice is none of those the key is for."""

    def check(job: Sections) -> Iterator[str]:
        section: Section = getattr(job, name)
        value, chosen = getattr(section, key), getattr(section, choice)
        if value != type(section).model_fields[key].default and chosen not in choices:
            yield (
                f"{name}.{key.replace('_', '-')} = {value}: "
                f"only for {choice.replace('_', '-')} = {or_(choices)}, "
                f"not {toml_value(chosen)}; remove it"
            )

    return check
