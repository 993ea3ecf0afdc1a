"""A round of a client that keeps something: what it kept is read, the job's method run, and what it keeps
now written before the update leaves. No torch.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from fedtune.adapters.spec import ADAPTER, DESCRIPTION
from fedtune.bundles.bundle import Bundle
from fedtune.common.seeds import generator
from fedtune.common.storage import write_atomic, write_json
from fedtune.data.clients import Stream
from fedtune.data.encoded import ClientData
from fedtune.errors import ContractError, Refused
from fedtune.round.batches import local_batches
from fedtune.round.rates import learning_rate
from fedtune.stateful.base import Client, Trained, Training
from fedtune.stateful.methods import method_of
from fedtune.stateful.store import Kept
from fedtune.training.chunks import trainable_batches
from fedtune.training.holder import require_converged
from fedtune.types import Arrays
from fedtune.wire import Packet

log = logging.getLogger(__name__)
Local = Callable[[Training], Trained]


def train_keeping(
    bundle: Bundle, kept: Kept | None, packet: Packet, client: str, data: ClientData | Stream, local: Local
) -> Trained:
    """(update, metrics) of one client.

    Raises Refused where training diverged, RunError for what it kept and cannot be read;
    nothing is written then.

    What it kept is that of the rounds before this one, so a round that is asked for again gives the same.
    """
    found = begin(bundle, kept, packet, client, data)
    trained = list[Trained]()
    for ask in method_of(bundle.job).trainings(bundle.job, found):
        trained.append(local(replace(ask, start=trained[-1][0] | ask.start) if trained else ask))
    return end(bundle, kept, packet, client, found, trained)


def begin(
    bundle: Bundle, kept: Kept | None, packet: Packet, client: str, data: ClientData | Stream
) -> Client:
    """A client as its method sees it, before its trainings. Raises RunError as `Kept.load`."""
    job, round = bundle.job, packet.header.round
    rates = {t.name: learning_rate(job.federation, t.name, round) for t in bundle.manifest.spec.trainable}
    model = packet.arrays | bundle.trained(packet.arrays)
    return Client(
        model,
        _place(kept).load(client, round - 1),
        len(batches_of(bundle, client, data, round)),
        rates,
        data.labels,
    )


def end(
    bundle: Bundle, kept: Kept | None, packet: Packet, client: str, found: Client, trained: Sequence[Trained]
) -> Trained:
    """(update, metrics) after its trainings; what it keeps is written. Raises Refused as `train_keeping`."""
    method = method_of(bundle.job)
    answer = method.answer(bundle.job, bundle.manifest.spec.schema, found, trained)
    require_converged(answer.metrics)
    if not all(np.isfinite(a).all() for a in answer.kept.values()):
        pull = f" or {method.calming}" if method.calming else ""
        raise Refused(
            "not-finite",
            "what this client keeps diverged: a number of it is not finite; "
            f"a lower federation.lr{pull} may help",
        )
    _place(kept).save(client, packet.header.round, answer.kept)
    return answer.update, answer.metrics


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


def batches_of(
    bundle: Bundle, client: str, data: ClientData | Stream, round: int, purpose: str = "local"
) -> list[np.ndarray]:
    """The examples of each optimizer step of a training, from the same draw as the steps themselves."""
    fed = bundle.job.federation
    drawn = local_batches(
        data.lengths,
        fed.batch_size,
        fed.local_epochs,
        fed.local_steps,
        generator(fed.seed, purpose, round, client),
    )
    return trainable_batches(data, list(drawn), bundle.job.model.task)
