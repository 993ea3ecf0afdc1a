"""fedtune: federated fine-tuning of pretrained models with adapters of kilobytes.

    run = fedtune.simulate({"federation": {"rounds": 5}}, out="runs/mine")
    run.rounds[-1]["accuracy"], run.predict(["what a lovely day"]), run.report()

`docs/python.md` has more. What is named here is loaded when it is first used:
a device and a coordinator never need torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.aggregation.rules import Rule
    from fedtune.errors import FedtuneError
    from fedtune.job import Job, load_job, parse_job
    from fedtune.types import ClientInfo, Update
    from fedtune.workflows.python import Run, open_run, simulate

__version__ = "0.1.0"
__all__ = [
    "ClientInfo",
    "FedtuneError",
    "Job",
    "Rule",
    "Run",
    "Update",
    "load_job",
    "open_run",
    "parse_job",
    "simulate",
]

_HOMES = {
    "errors": ("FedtuneError",),
    "types": ("ClientInfo", "Update"),
    "job": ("Job", "load_job", "parse_job"),
    "aggregation.rules": ("Rule",),
    "workflows.python": ("Run", "open_run", "simulate"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedtune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
