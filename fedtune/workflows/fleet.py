"""The devices of a job's simulated clients, checked against what a training step needs."""

from fedtune.errors import JobError
from fedtune.gradient_init import gradient_bytes
from fedtune.report.format import size
from fedtune.simulation.devices import MB
from fedtune.simulation.fleet import Fleet
from fedtune.wire import packet_bytes
from fedtune.workflows.setup import Setup


def make_fleet(setup: Setup) -> Fleet | None:
    """None for a job without device classes. Raises JobError when nobody could ever train."""
    job, spec = setup.job, setup.spec
    limits = {device.memory_mb for device in job.simulation.devices} - {0}
    if not job.simulation.devices:
        return None
    step = setup.step_memory if limits else None
    if limits and step is None:
        raise JobError([f"simulation.devices: memory-mb = {min(limits)}: what a step of this base needs cannot be computed from shapes; set memory-mb to 0"])
    fleet = Fleet(job, setup.store.clients, step, packet_bytes(setup.schema)[1], gradient_bytes(spec)[1] if job.adapter.asks_gradients else 0)
    if step is not None and not fleet.fit[fleet.classes].any():
        raise JobError([f"simulation.devices: memory-mb = {max(limits)}: a training step needs {size(step)}, so none of the {len(fleet.clients)} clients can take part; "
                        f"give a class memory-mb = {-(-step // MB)}, or lower federation.batch-size"])
    return fleet
