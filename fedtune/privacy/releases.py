"""What leaves the clients, as the ledger keeps it and accountants read it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedtune.errors import RunError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Unit = Literal["none", "example", "client"]
Sampling = Literal["none", "poisson", "fixed"]


class Step(NamedTuple):
    """One use of a mechanism, as far as its cost goes.

    multiplier: standard deviation of the Gaussian noise over the norm bound of one unit's contribution.
    sampling: how the units of one use were drawn. rate: poisson, the chance of each. sample, population:
    fixed. excess: what the noise falls short of a Gaussian's, added to 1 / multiplier (distributed
    discrete noise; else 0).
    """

    multiplier: float
    sampling: Sampling = "none"
    rate: float = 1.0
    sample: int = 0
    population: int = 0
    excess: float = 0.0


class Release(BaseModel):
    """One event of the ledger. Unknown fields are errors: what cannot be read cannot be accounted for."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    release: Literal["updates", "evaluation", "gradients", "scores"]
    mechanism: Literal["none", "gaussian", "distributed"]
    unit: Unit
    clients: list[str] | int = Field(default_factory=list)
    """Whose data it is of; empty: everyone's.

    A number, where nothing is protected and only the count was kept.
    """
    noise: Literal["system", "seeded"] = "system"
    """Where its randomness came from: the operating system, or a seed that others may know."""
    parts: dict[str, Positive] = Field(default_factory=dict)
    """What left at once, with the multiplier of each: {"update": 1.02, "clip-bits": 5.0}."""
    clip: float = 0.0
    sampling: Sampling = "none"
    rate: Annotated[float, Field(ge=0, le=1)] = 1.0
    sample: Annotated[int, Field(ge=0)] = 0
    population: Annotated[int, Field(ge=0)] = 0
    excess: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    count: Annotated[int, Field(ge=1)] = 1
    """Uses of the mechanism in this release: the optimizer steps of example-level DP-SGD."""
    note: Annotated[str, Field(max_length=64)] = ""
    """Tells two releases of one round apart."""

    @model_validator(mode="after")
    def _whole(self) -> "Release":
        if self.mechanism != "none" and (not self.parts or self.unit == "none" or self.clip <= 0):
            raise ValueError("a protected release needs a unit, a clip and the multiplier of each part")
        if self.sampling == "fixed" and not 0 < self.sample <= self.population:
            raise ValueError("fixed-size sampling needs 0 < sample <= population")
        return self

    @property
    def protected(self) -> bool:
        return self.mechanism != "none" and self.noise == "system"

    @property
    def step(self) -> Step:
        return Step(
            together(self.parts.values()), self.sampling, self.rate, self.sample, self.population, self.excess
        )

    @property
    def names(self) -> list[str]:
        """The clients it names."""
        return self.clients if isinstance(self.clients, list) else []

    def facts(self) -> dict[str, Any]:
        """As the ledger keeps it: what differs from the defaults."""
        return self.model_dump(exclude_defaults=True)


def read(facts: Mapping[str, Any]) -> Release:
    """Raises RunError for an event that cannot be read whole."""
    try:
        return Release.model_validate(dict(facts))
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False)[0]
        raise RunError(
            f"an event of the ledger cannot be read ({'.'.join(map(str, first['loc'])) or 'event'}: "
            f"{first['msg']}); no privacy can be claimed from it"
        ) from None


def together(multipliers: Iterable[float]) -> float:
    """The multiplier of Gaussian releases of one sample made at once: 1 / z^2 adds up, as they are one
    Gaussian of a longer vector.

    >>> round(together([2.0, 2.0]), 6)
    1.414214
    """
    total = sum(z**-2 for z in multipliers)
    return total**-0.5 if total > 0 else math.inf


History = tuple[tuple[Step, int], ...]
"""Steps with their numbers of uses, sorted: what one unit was part of.

Two with the same history have the same epsilon.
"""


def history(releases: Iterable[Release]) -> History:
    """n uses in one release are n releases of one use."""
    counts: Counter[Step] = Counter()
    for release in releases:
        counts[release.step] += release.count
    return tuple(sorted(counts.items()))


def histories(releases: Iterable[Release], clients: Iterable[str]) -> dict[str, History]:
    """The history of each client's data. All releases must be protected."""
    everyone: list[Release] = []
    own: dict[str, list[Release]] = {name: [] for name in clients}
    for release in releases:
        if not release.names:
            everyone.append(release)
        for name in release.names:
            own.setdefault(name, []).append(release)
    return {name: history([*everyone, *parts]) for name, parts in own.items()}
