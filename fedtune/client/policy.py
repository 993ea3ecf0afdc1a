"""The device owner's policy: what jobs this device takes part in, whatever the coordinator asks for."""

import math
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtune.bundles.bundle import Manifest
from fedtune.errors import PrivacyRefused, Refused, UserError
from fedtune.job import Job
from fedtune.privacy.plan import fewest, plan_of
from fedtune.tasks import TaskName

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FILE = "policy.toml"


class Policy(BaseModel):
    """policy.toml; an absent key allows everything, but min-cohort is then 3.

    Unknown keys are errors, as a misspelt limit would not limit.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        allow_inf_nan=False,
    )

    allowed_bases: list[Digest] | None = None
    allowed_tasks: list[TaskName] | None = None
    allowed_methods: list[str] | None = None
    privacy_unit: Literal["example", "client"] | None = None
    min_noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    max_epsilon: Annotated[float, Field(gt=0)] | None = None
    max_rounds: Annotated[int, Field(ge=1)] | None = None
    min_cohort: Annotated[int, Field(ge=2)] = 3
    """Under secure aggregation: fewest clients whose sum this device is part of."""

    def check(self, manifest: Manifest, job: Job) -> None:
        """Raises Refused, with the key that forbids it, for a job that asks for more than is allowed."""
        _among("allowed-bases", self.allowed_bases, manifest.sha256, "a base of sha256")
        # a manifest can say other than its job
        for task, method in ((manifest.task, manifest.spec.method), (job.model.task, job.adapter.method)):
            _among("allowed-tasks", self.allowed_tasks, task, "the task")
            _among("allowed-methods", self.allowed_methods, method, "the method")
        if self.privacy_unit is not None and job.privacy.unit != self.privacy_unit:
            raise _forbidden(
                "privacy-unit",
                f"the job protects {_shown(job.privacy.unit)}, this device wants {self.privacy_unit!r}",
            )
        least = min(job.privacy.noise_multiplier, job.privacy.init_noise or math.inf)
        if self.min_noise_multiplier is not None and least < self.min_noise_multiplier:
            raise _forbidden(
                "min-noise-multiplier",
                f"the job adds {least:g}, at least {self.min_noise_multiplier:g} is wanted",
            )
        if self.max_epsilon is not None and (epsilon := own_epsilon(job)) > self.max_epsilon:
            raise _forbidden(
                "max-epsilon", f"the job's epsilon is {epsilon:.4g}, at most {self.max_epsilon:g} is allowed"
            )
        if self.max_rounds is not None and job.federation.rounds > self.max_rounds:
            raise _forbidden(
                "max-rounds",
                f"the job has {job.federation.rounds} rounds, at most {self.max_rounds} are allowed",
            )
        if job.privacy.secure_aggregation:
            _in_company(job, self.min_cohort)


def _in_company(job: Job, least: int) -> None:
    with refusing():
        found = fewest(job)
    if found < least:
        raise _forbidden(
            "min-cohort", f"sums of {found} clients would open, this device is only part of those of {least}"
        )


@contextmanager
def refusing() -> Iterator[None]:
    """A job that promises more than it gives is refused by the device that works that out."""
    try:
        yield
    except PrivacyRefused as e:
        raise Refused("privacy", str(e)) from None


def own_epsilon(job: Job) -> float:
    """The most that the job can cost this device's data, worked out here from its noise;
    infinite when it protects nothing.
    """
    if job.privacy.unit == "none" or job.privacy.noise == "seeded":
        return math.inf
    with refusing():
        plan = plan_of(job, 0)
    return math.inf if plan is None else plan.reading().epsilon


def load_policy(path: Path) -> Policy:
    """Raises UserError for a file that cannot be read or holds anything but known keys."""
    try:
        return Policy.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        known = ", ".join(name.replace("_", "-") for name in Policy.model_fields)
        if first["type"] == "extra_forbidden":
            raise UserError(f"{path}: {where}: unknown key; known keys: {known}") from None
        raise UserError(f"{path}: {where}: {first['msg']}; mend it or remove the key") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UserError(
            f"{path}: cannot be read as a policy ({e}); mend it, or remove it to allow every job"
        ) from None


def _among(key: str, allowed: Sequence[str] | None, found: str, what: str) -> None:
    if allowed is not None and found not in allowed:
        raise _forbidden(
            key,
            f"the job wants {what} {found[:16]}{'…' if len(found) > 16 else ''}, which is not in the list",
        )


def _forbidden(key: str, reason: str) -> Refused:
    return Refused("policy", f"{key}: {reason}")


def _shown(unit: str) -> str:
    return "nobody" if unit == "none" else repr(unit)
