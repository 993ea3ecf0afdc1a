"""How many blocks each class of devices trains, where its memory and the time of a round say it."""

from collections.abc import Callable

import numpy as np

from fedtune.algorithms.units import lowest, require_budgets, step_share
from fedtune.data.partition import Split
from fedtune.errors import JobError
from fedtune.job import DeviceClass, FederationSection, Job
from fedtune.simulation.devices import MB, span
from fedtune.wire import Schema

StepMemory = Callable[[int, int], int | None]
"""Bytes that a training client of so many blocks and this rank (0: adapter.rank) needs; None where that is not known."""


def fitted(job: Job, schema: Schema, memory: StepMemory, examples: float) -> Job:
    """The job with `units` of each class set to the most blocks that fit, at least one; the same job without units.fit.

    The cost of blocks is that of all they need: activations and backward pass from the lowest of them to the output; where any may be drawn or chosen,
    from the first. More than the class's own `units`, or else units.budget, where it is given, are never taken. examples: that a client runs in a round, in the mean. Raises JobError where memory is not known.
    """
    if not job.units.fit:
        return job
    require_budgets(job, schema)
    devices = tuple(device.model_copy(update={"units": _most(job, schema, device, memory, examples)}) for device in job.simulation.devices)
    units = job.units.model_copy(update={"budget": job.units.budget or max(device.units for device in devices)})
    return job.model_copy(update={"units": units, "simulation": job.simulation.model_copy(update={"devices": devices})})


def mean_examples(parts: Split, settings: FederationSection) -> float:
    """How many examples a client runs in a round, in the mean over all clients."""
    run = np.array([len(place) for place in parts.train]) * settings.local_epochs
    return float((np.minimum(run, settings.local_steps * settings.batch_size) if settings.local_steps else run).mean())


def _most(job: Job, schema: Schema, device: DeviceClass, memory: StepMemory, examples: float) -> int:
    """By halving, as more blocks never cost less."""
    low, high = 1, device.units or job.units.budget or len(schema.blocks)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(job, schema, device, middle, memory, examples) else (low, middle - 1)
    return low


def _fits(job: Job, schema: Schema, device: DeviceClass, blocks: int, memory: StepMemory, examples: float) -> bool:
    run = examples * step_share(schema, lowest(job, schema, blocks))
    if job.units.seconds and span(device, 0, run, 0).train > job.units.seconds:
        return False
    if not device.memory_mb:
        return True
    step = memory(blocks, device.rank)
    if step is None:
        raise JobError(["units.fit = true: what a step of this base needs cannot be computed from shapes; set it to false and give each class of devices its units"])
    return step <= device.memory_mb * MB
