"""What a client keeps from round to round: read before its trainings, written before its update leaves.
No torch.
"""

import logging
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from fedtune.adapters.spec import ADAPTER, DESCRIPTION
from fedtune.bundles.bundle import Bundle
from fedtune.common.storage import write_atomic, write_json
from fedtune.data.clients import Stream
from fedtune.data.encoded import ClientData
from fedtune.errors import ContractError, Refused
from fedtune.job import Job
from fedtune.round.batches import training_batches
from fedtune.round.rates import learning_rate
from fedtune.stateful.base import Client, Method
from fedtune.stateful.methods import method_of
from fedtune.stateful.store import Kept
from fedtune.types import Arrays

log = logging.getLogger(__name__)


def begin(
    job: Job,
    bundle: Bundle,
    kept: Kept | None,
    model: Arrays,
    round: int,
    client: str,
    data: ClientData | Stream,
) -> Client:
    """A client as its method sees it, before its trainings. model: as it came, of the client's rank.

    What it kept is that of the rounds before this one, so a round that is asked for again gives the same.
    Raises RunError as `Kept.load`.
    """
    return Client(
        model | bundle.trained(model),
        _place(kept).load(client, round - 1),
        len(training_batches(job, client, data, round)),
        {t.name: learning_rate(job.federation, t.name, round) for t in bundle.manifest.spec.trainable},
        data.labels,
    )


def keep(method: Method, kept: Kept | None, client: str, round: int, arrays: Arrays) -> None:
    """Writes what a client keeps after a round. Raises Refused, and writes nothing, where it diverged."""
    if not all(np.isfinite(a).all() for a in arrays.values()):
        pull = f" or {method.calming}" if method.calming else ""
        raise Refused(
            "not-finite",
            "what this client keeps diverged: a number of it is not finite; "
            f"a lower federation.lr{pull} may help",
        )
    _place(kept).save(client, round, arrays)


def _place(kept: Kept | None) -> Kept:
    if kept is None:
        raise ContractError("the job's clients keep something, and there is no place for it")
    return kept


def personal_model(bundle: Bundle, kept: Kept, model: Arrays, client: str, round: int) -> Arrays | None:
    """The trained tensors with which a client predicts after this round;
    None where it has nothing of its own to predict with.
    """
    personal = method_of(bundle.job).personal
    own = kept.load(client, round) if personal else None
    return None if personal is None or own is None else personal(bundle.trained(model), own)


def own_model(bundle: Bundle, kept: Kept | None, model: Arrays, client: str, round: int) -> Arrays | None:
    """As `personal_model`; of a device, which is one client, it also lies afterwards in the folder of what
    it keeps, as an adapter that `fedtune predict` takes.
    """
    found = None if kept is None else personal_model(bundle, kept, model, client, round)
    if kept is not None and kept.owner and found is not None:
        try:
            write_atomic(
                kept.folder / ADAPTER,
                save({name: np.ascontiguousarray(a) for name, a in found.items()}),
                0o600,
            )
            write_json(
                kept.folder / DESCRIPTION,
                {
                    "method": bundle.manifest.spec.method,
                    "round": round,
                    "frame_sha256": bundle.manifest.frame_sha256,
                },
            )
        except OSError as e:  # the scores do not depend on it
            log.warning(
                "%s: this device's own adapter of round %d was not written (%s)",
                kept.folder,
                round,
                e.strerror or e,
            )
    return found


def own_state(bundle: Bundle, folder: Path | None) -> Kept | None:
    """Where a device, which is one client, keeps its own; None for a job whose clients keep
    nothing, or without a folder.
    """
    keeps = method_of(bundle.job).keeps
    if folder is None or keeps is None:
        return None
    return Kept(folder, keeps(bundle.manifest.spec.schema), owner="device")
