"""What a model learns to do: a `Task` is one frozen object, and `table` names those that exist.

numpy alone, no torch: server, client and edge take tasks from here. What a task is in torch is its loss, in
`fedtune.models.losses`.
"""

from fedtune.tasks.base import Inputs, Right, Targets, Task, cross_entropy
from fedtune.tasks.table import TASKS, TaskName, task_named

__all__ = ["TASKS", "Inputs", "Right", "Targets", "Task", "TaskName", "cross_entropy", "task_named"]
