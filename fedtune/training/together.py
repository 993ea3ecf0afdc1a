"""Finds how a base can be trained for many clients at once, and proves it on the spot: a layout is used only if it gives the plain model's losses."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from fedtune.adapters.methods import Parameters, write
from fedtune.adapters.spec import AdapterSpec
from fedtune.job import FederationSection
from fedtune.models.base import TunableModel, summed_loss
from fedtune.models.cut import lowest_unit
from fedtune.models.load import Encoder
from fedtune.models.packed import NotPackable
from fedtune.training.chunks import Task, join
from fedtune.training.cohort import CohortTrainer
from fedtune.training.features import FeatureStore
from fedtune.training.local import ClientData, device_of, to_batch
from fedtune.training.passes import Packed, Padded, Pass
from fedtune.training.stacked import NotStackable, Stack
from fedtune.types import Arrays
from fedtune.wire import Pieces

CHUNK_BYTES = 3 * 2**27
"""What autograd may keep of one chunk. Larger chunks are no faster on a CPU, as they leave its caches."""
TOLERANCE = 2e-4
"""Largest difference of a loss from the plain model's, as a share of it: float32 through many layers, in another order of adding."""


def open_trainer(
    model: TunableModel, parameters: Parameters, spec: AdapterSpec, encoder: Encoder, settings: FederationSection,
    start: Arrays, sample: ClientData, features: FeatureStore,
) -> CohortTrainer:
    """The fastest way that this base allows.

    Args:
        start: values of the trained tensors to try with.
        sample: a few examples, at best of different lengths.

    Raises NotStackable when there is none: the clients then have to be trained one by one.
    """
    Stack(model, parameters)
    for through in _passes(model, spec, encoder, features, next(iter(parameters.values())).device):
        trainer = CohortTrainer(model, parameters, spec.trainable, settings, through, features, 2**20)
        if (row := _tried(trainer, parameters, spec, encoder, start, sample)) is not None:
            features.close()  # made for the trial
            trainer.chunk = max(1, CHUNK_BYTES // row)
            return trainer
    raise NotStackable("its layers mix examples in a way that cannot be kept apart")


def _passes(model: TunableModel, spec: AdapterSpec, encoder: Encoder, features: FeatureStore, device: torch.device) -> Iterator[Pass]:
    """Ways to try, the fastest first."""
    unit = lowest_unit(model.body, {t.unit for t in spec.trainable})
    for cut in dict.fromkeys([unit, None]):
        for first in dict.fromkeys([0, _padding_place(model) + 1]):
            try:
                yield Packed(model, cut, device, first)
            except NotPackable:
                break
        yield Padded(model, encoder, cut, device)


def _padding_place(model: TunableModel) -> int:
    """RoBERTa's family counts positions from the padding token's number; -1 where nothing of the kind is known."""
    place = getattr(getattr(model.body, "config", None), "pad_token_id", None)
    return place if isinstance(place, int) else -1


def _tried(trainer: CohortTrainer, parameters: Parameters, spec: AdapterSpec, encoder: Encoder, start: Arrays, sample: ClientData) -> int | None:
    """Trains two different models on the same examples: None unless each gives the losses of the plain model that holds its values.

    Returns the bytes that autograd kept for each row (token or image), as measured.
    """
    first = np.concatenate([start[t.name].ravel() for t in spec.trainable]).astype(np.float32)
    draw = np.random.default_rng(0)
    shift = [draw.standard_normal(t.size) * (0.1 * float(start[t.name].std()) or 0.02) for t in spec.trainable]
    both = np.stack([first, first + np.concatenate(shift).astype(np.float32)])
    places = np.arange(len(sample))
    task = Task("", sample, [places])
    part = join([(0, task, places), (1, task, places)], trainer.model.task)
    order = np.argsort(part.lengths, kind="stable")
    ordered = part.take(order)
    models = torch.from_numpy(both).to(trainer.device)
    try:
        with trainer.running([task]), kept_bytes(trainer.model) as kept:
            scores = trainer.gradients(models, np.arange(2), ordered, ordered.row)[1]
    except (NotPackable, NotStackable, RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError):
        return None
    found = np.empty(len(part))
    found[order] = scores[:, 0]
    wanted = np.concatenate([_losses(trainer.model, parameters, spec, values, sample, encoder) for values in both])
    if not np.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE):
        return None
    rows = int(part.lengths.sum())
    return max(1, sum(kept.values()) // rows)


def _losses(model: TunableModel, parameters: Parameters, spec: AdapterSpec, values: np.ndarray, data: ClientData, encoder: Encoder) -> np.ndarray:
    """Summed loss of each example [n] from the plain model with these values [P]."""
    write(parameters, dict(Pieces(values, spec.schema.layout)))
    with torch.no_grad():
        batch, labels = to_batch(data, np.arange(len(data)), encoder, device_of(model))
        return summed_loss(model(**batch), batch, labels, model.task)[0].cpu().numpy()


@contextmanager
def kept_bytes(model: TunableModel) -> Iterator[dict[int, int]]:
    """Inside, counts the bytes of each storage that autograd keeps, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no later storage takes an address

    def pack(t: Tensor) -> Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = t.untyped_storage().nbytes()
            held.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept
