"""The whole job."""

from pydantic import model_validator

from fedtune.job.agreement import disagreements
from fedtune.job.sections import Sections


class Job(Sections):
    """A whole job, whose keys agree; `Job()` is the default one."""

    @model_validator(mode="after")
    def _agree(self) -> "Job":
        problems = list(disagreements(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
