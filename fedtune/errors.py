"""Every error fedtune raises on purpose, drawn as a tree.

    FedtuneError
    ├── UserError               exit 2   the person who typed can mend it
    │   ├── JobError                     the job file or --set; holds every problem found
    │   ├── DataError                    what a data file or folder holds
    │   ├── ModelError                   the base model or its name
    │   └── RunError                     a run folder: missing, of another job, half written
    ├── EnvironmentProblem      exit 3   the machine: a missing extra, a full disk, no network
    ├── PrivacyRefused          exit 4   the setting would claim more privacy than it gives
    ├── Refused                          one update from outside; the round goes on without it
    ├── SecAggFailed                     a secure sum that too few finished, or that does not open;
    │                                    nothing of it is released
    └── ContractError                    a caller inside fedtune broke a contract
        ├── EmptyCohort                  nothing to average
        └── ShapeMismatch                tensors that should agree do not

A message names the value found, the limit, and the remedy, on one line. Commands print it and exit with the
code; a traceback means a bug in fedtune.
"""

from collections.abc import Sequence


class FedtuneError(Exception):
    """Root of the tree; `exit_code` is what a command returns for it."""

    exit_code = 1


class UserError(FedtuneError):
    exit_code = 2


class JobError(UserError):
    """All the problems of a job at once; `problems` has one line each."""

    def __init__(self, problems: Sequence[str], source: str = "job") -> None:
        self.problems = tuple(problems)
        self.source = source
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__(f"{source}: {count}\n{lines}")


class DataError(UserError):
    pass


class ModelError(UserError):
    pass


class RunError(UserError):
    pass


class EnvironmentProblem(FedtuneError):
    exit_code = 3


class PrivacyRefused(FedtuneError):
    exit_code = 4


class Refused(FedtuneError):
    """An update from outside that is not taken.

    `reason` is a short fixed word for counters, the message has the rest.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {message}")


class SecAggFailed(FedtuneError):
    pass


class ContractError(FedtuneError):
    pass


class EmptyCohort(ContractError):
    pass


class ShapeMismatch(ContractError):
    pass
