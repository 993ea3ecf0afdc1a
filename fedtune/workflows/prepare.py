"""fedtune prepare: from a job to the bundle that a coordinator serves.

Needs torch and the base, and no client's data.
"""

from collections.abc import Callable
from pathlib import Path

from fedtune.bundles.bundle import Bundle
from fedtune.common.storage import failing_clearly
from fedtune.errors import RunError
from fedtune.job import Job
from fedtune.privacy.plan import resolved
from fedtune.workflows.setup import data_free_frame, make_bundle, open_base, require_trainable


def prepare(
    job: Job,
    folder: Path,
    edge: Path | None = None,
    stage: Callable[[str], None] = lambda text: None,
    int8: bool = False,
) -> Bundle:
    """Makes the bundle in `folder`, which must be new or empty, and in `edge`, which must not exist, what
    devices without torch train with; with `int8`, on frozen weights of 8 bits.

    Raises UserErrors: a base that is not here or that no graph can be made of, a folder that holds something.
    """
    if edge is not None:
        if edge.exists():
            raise RunError(f"{edge} already exists; choose another --edge")
        if job.adapter.asks_gradients:
            raise RunError(
                f'adapter.init = "{job.adapter.init}": devices make the frame, so there is none yet for '
                '--edge; use init = "weights"'
            )
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
    bundle = make_bundle(base, folder, data_free_frame(base, model), model, {})
    if edge is not None:
        from fedtune.workflows.edge_folder import write_edge_folder

        write_edge_folder(base, bundle, edge, stage, int8)
    return bundle
