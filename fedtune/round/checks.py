"""What an update must be before it is averaged."""

from collections.abc import Sequence
from functools import cache

from fedtune.common.metrics import plausible
from fedtune.common.trees import norm, subtract
from fedtune.errors import Refused
from fedtune.job import Job
from fedtune.tasks import task_named
from fedtune.types import Arrays
from fedtune.wire import Packet, Schema


def require_assigned(packet: Packet, schema: Schema, assigned: Sequence[int] | None) -> None:
    """assigned: places of tensors in the schema; None: all. Raises Refused for an update of others."""
    if packet.header.tensors == assigned:
        return
    wanted = (
        "all were"
        if assigned is None
        else (
            f"{len(assigned)}, from {schema.tensors[assigned[0]].name} "
            f"to {schema.tensors[assigned[-1]].name}, were"
        )
    )
    raise Refused("tensors", f"{len(packet.arrays)} of {len(schema.tensors)} tensors; {wanted} assigned")


def require_within_limits(packet: Packet, job: Job, model: Arrays, center: float) -> None:
    """center: the L2 norm of the model. Raises Refused for a weight, metrics or a distance from the model
    that no honest client has.
    """
    fed = job.federation
    if packet.header.weight > fed.max_weight:
        raise Refused(
            "weight",
            f"{packet.header.weight:g} examples claimed, federation.max-weight is {fed.max_weight:g}",
        )
    if not plausible(packet.metrics, most_predictions(job) * fed.local_epochs):
        raise Refused("metrics", "not the sums of loss and right predictions over one number of predictions")
    # |u - m| is at most |u| + |m|, and both are known: only near the limit is every difference looked at.
    # 2 % and 1e-12 are more than packet.norm and the rounding of the differences can be off.
    if 1.02 * (packet.norm + center) + 1e-12 <= fed.max_norm:
        return
    size = norm(subtract(packet.arrays, {name: model[name] for name in packet.arrays}))
    if not size <= fed.max_norm:
        raise Refused("norm", f"{size:.4g} from the model, federation.max-norm is {fed.max_norm:g}")


def most_predictions(job: Job) -> float:
    """The largest number of predictions a client may claim for one pass over its data."""
    return job.federation.max_weight * _of_an_example(job.model.task, job.model.max_length)


@cache  # asked for every update
def _of_an_example(task: str, max_length: int) -> int:
    return task_named(task).most_predictions(max_length)
