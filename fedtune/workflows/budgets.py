"""How many blocks each class of devices trains, and how deep they may lie,
where its memory and the time of a round say it.
"""

from collections.abc import Callable

import numpy as np

from fedtune.algorithms.units import Limits, lowest, require_budgets, step_share
from fedtune.data.partition import Split
from fedtune.errors import JobError
from fedtune.job import DeviceClass, FederationSection, Job
from fedtune.simulation.devices import MB, span
from fedtune.wire import Schema

StepMemory = Callable[[Limits], int | None]
"""Bytes that a training client of these limits needs; None where that is not known."""


def fitted(job: Job, schema: Schema, memory: StepMemory, examples: float) -> Job:
    """The job with `units` of each class set to the most blocks that fit, at least one;
    the same job without units.fit.

    The cost of blocks is that of all they need: activations and backward pass from the lowest of them to the
    output. Where they are drawn (lisa), that is the first of all. Where they are chosen by scores, the class
    also gets a `depth` (methods.md, section 3.4 a): first as many blocks as fit were they the last ones, then
    the greatest depth at which so many fit, wherever they lie; and only a class that can go down to the first
    block is probed. So without a budget a class takes all that it can reach, and has nothing to choose; a
    small budget leaves it more.

    More than the class's own `units`, or else units.budget, and its own `depth` are never taken. examples:
    that a client runs in a round, in the mean. Raises JobError where memory is not known, and where clients
    are to be probed and no class can be.
    """
    if not job.units.fit:
        return job
    require_budgets(job, schema)
    devices = tuple(
        device.model_copy(update=_fit(job, schema, device, memory, examples))
        for device in job.simulation.devices
    )
    units = job.units.model_copy(
        update={"budget": job.units.budget or max(device.units for device in devices)}
    )
    made = job.model_copy(
        update={"units": units, "simulation": job.simulation.model_copy(update={"devices": devices})}
    )
    require_budgets(made, schema)
    return made


def mean_examples(parts: Split, settings: FederationSection) -> float:
    """How many examples a client runs in a round, in the mean over all clients."""
    run = np.array([len(place) for place in parts.train]) * settings.local_epochs
    return float(
        (np.minimum(run, settings.local_steps * settings.batch_size) if settings.local_steps else run).mean()
    )


def _fit(
    job: Job, schema: Schema, device: DeviceClass, memory: StepMemory, examples: float
) -> dict[str, int]:
    blocks = len(schema.blocks)
    limit, deepest = device.units or job.units.budget or blocks, device.depth or blocks

    def fits(units: int, depth: int) -> bool:
        return _fits(job, schema, device, Limits(units, depth, device.rank), memory, examples)

    if not job.units.probes:
        return {"units": _most(lambda units: fits(units, 0), 1, limit)}
    units = _most(lambda units: fits(units, units), 1, min(limit, deepest))
    depth = _most(lambda depth: fits(units, depth), units, deepest)
    return {"units": units, "depth": depth}


def _most(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number that fits; the lowest is taken unasked. By halving, as more never costs less."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _fits(
    job: Job, schema: Schema, device: DeviceClass, limits: Limits, memory: StepMemory, examples: float
) -> bool:
    run = examples * step_share(schema, lowest(job, schema, limits))
    if job.units.seconds and span(device, 0, run, 0).train > job.units.seconds:
        return False
    if not device.memory_mb:
        return True
    step = memory(limits)
    if step is None:
        raise JobError(
            [
                (
                    "units.fit = true: what a step of this base needs cannot be computed from shapes; "
                    "set it to false and give each class of devices its units"
                )
            ]
        )
    return step <= device.memory_mb * MB
