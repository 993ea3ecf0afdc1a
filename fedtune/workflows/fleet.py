"""The devices of a job's simulated clients, checked against what a training step needs."""

from fedtune.algorithms.units import limits_of, unlimited
from fedtune.errors import JobError
from fedtune.report.format import size
from fedtune.round.gradient_init import gradient_bytes
from fedtune.simulation.devices import MB
from fedtune.simulation.fleet import Fleet
from fedtune.workflows.setup import Setup


def make_fleet(setup: Setup) -> Fleet | None:
    """None for a job without device classes. Raises JobError when nobody could ever train."""
    job, schema, devices = setup.job, setup.schema, setup.job.simulation.devices
    limits = {device.memory_mb for device in devices} - {0}
    if not devices:
        return None
    steps = [setup.step_memory(limits_of(device)) if limits else None for device in devices]
    known = [step for step in steps if step is not None]
    if limits and len(known) < len(steps):
        raise JobError(
            [
                (
                    f"simulation.devices: memory-mb = {min(limits)}: what a step of this base needs cannot "
                    "be computed from shapes; set memory-mb to 0"
                )
            ]
        )
    fleet = Fleet(
        job,
        setup.store.clients,
        steps,
        schema,
        gradient_bytes(setup.spec)[1] if job.adapter.asks_gradients else 0,
    )
    if limits and not fleet.fit[fleet.classes].any():
        least = min(known)
        raise JobError(
            [
                f"simulation.devices: memory-mb = {max(limits)}: a training step needs {size(least)}, "
                f"so none of the {len(fleet.clients)} clients can take part; "
                f"give a class memory-mb = {-(-least // MB)}, or lower federation.batch-size"
            ]
        )
    if job.units.probes and not any(
        fleet.fit[place] and unlimited(schema, devices[place].depth) for place in set(fleet.classes.tolist())
    ):
        raise JobError(
            [
                f'units.strategy = "{job.units.strategy}": a probe takes the backward pass through all '
                f"{len(schema.blocks)} blocks, and of the {len(fleet.clients)} clients none is of a class "
                'that can; give more memory-mb, units.seconds or depth, or use "top" or "lisa"'
            ]
        )
    return fleet
