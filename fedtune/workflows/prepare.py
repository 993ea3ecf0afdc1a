"""fedtune prepare: from a job to the bundle that a coordinator serves. Needs torch and the base, and no client's data."""

from collections.abc import Callable
from pathlib import Path

from fedtune.bundle import Bundle
from fedtune.errors import RunError
from fedtune.job import Job
from fedtune.privacy.plan import resolved
from fedtune.storage import failing_clearly
from fedtune.workflows.setup import data_free_frame, make_bundle, open_base, require_trainable


def prepare(job: Job, folder: Path, stage: Callable[[str], None] = lambda text: None) -> Bundle:
    """Makes the bundle in `folder`, which must be new or empty.

    Raises UserErrors: a base that is not here, a folder that holds something.
    """
    with failing_clearly(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder} already exists and is not empty; choose another -o")
    stage("opening the base")
    base = open_base(resolved(job, 0))
    require_trainable(base)
    _ = base.spec
    model = base.fresh_model()
    _ = base.encoder  # a tokenizer that is not this base's is found here and not on every device
    if job.adapter.asks_gradients:  # the coordinator makes the frame, once devices have sent gradients
        return make_bundle(base, folder, {}, model, {})
    stage("making the frame")
    return make_bundle(base, folder, data_free_frame(base, model), model, {})
