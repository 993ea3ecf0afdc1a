"""The tasks that a job, a manifest or a card can name.

To add one, write its file in this folder, which makes a `Task`, and give it a row in TASKS. With `targets` of
its own it also needs a row in LOSSES of `fedtune.models.losses`, the same loss in torch. Then
`tests/contracts/test_tasks.py` holds it to what all tasks promise.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from fedtune.errors import ContractError
from fedtune.tasks.base import Task
from fedtune.tasks.images import IMAGE_CLASSIFICATION
from fedtune.tasks.texts import TEXT_CLASSIFICATION
from fedtune.tasks.tokens import CAUSAL_LM

TASKS: Mapping[str, Task] = {
    task.name: task for task in (TEXT_CLASSIFICATION, IMAGE_CLASSIFICATION, CAUSAL_LM)
}

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]
"""One of their names, which pydantic checks. Type checkers do not take a Literal from a table."""


def task_named(name: str) -> Task:
    """Raises ContractError for a name that is in no table."""
    if name not in TASKS:
        raise ContractError(f"task = {name!r}: is not known; use one of {', '.join(TASKS)}")
    return TASKS[name]
