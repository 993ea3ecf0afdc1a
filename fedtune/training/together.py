"""Finds how a base can be trained for many clients at once, and proves it on the spot: a layout is used
only if it gives the plain model's losses.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.adapters.layers.stacked import NotStackable
from fedtune.adapters.methods import Parameters, write
from fedtune.adapters.spec import AdapterSpec
from fedtune.data.encoded import ClientData, Encoder
from fedtune.errors import EnvironmentProblem
from fedtune.job import FederationSection
from fedtune.models.base import TunableModel
from fedtune.models.cut import lowest_unit
from fedtune.models.packed import NotPackable
from fedtune.training.chunks import Task, join
from fedtune.training.cohort import CohortTrainer
from fedtune.training.features import FeatureStore
from fedtune.training.local import device_of, to_batch
from fedtune.training.passes import Packed, Padded, Pass
from fedtune.training.stacked import Stack
from fedtune.types import Arrays
from fedtune.wire import Pieces

CHUNK_BYTES = 3 * 2**27
"""What autograd may keep of one chunk. Larger chunks are no faster on a CPU, as they leave its caches."""
LOSS, GRADIENT = 5e-5, 1e-2
"""Largest difference of a loss from the plain model's, and of a model's gradient as a share of its L2 norm:
float32 in another order of adding, where a value at the bend of a ReLU can fall on its other side. Examples
mixed up make a gradient another one altogether.
"""


def open_trainer(
    model: TunableModel,
    parameters: Parameters,
    spec: AdapterSpec,
    encoder: Encoder,
    settings: FederationSection,
    start: Arrays,
    sample: ClientData,
    features: FeatureStore,
    changing: Collection[str] = (),
) -> CohortTrainer:
    """The fastest way that this base allows.

    Args:
        parameters, spec: what is trained, and has gradients; all else is as the model has it now.
        start: values of the trained tensors to try with.
        sample: a few examples, at best of different lengths.
        changing: units that other rounds or clients train: features are kept only of
            what lies below these, too.

    Raises NotStackable when there is none: the clients then have to be trained one by one.
    """
    Stack(model, parameters)
    unit = lowest_unit(model.body, {*changing, *(t.unit for t in spec.trainable)})
    for through in _passes(model, unit, encoder, sample, next(iter(parameters.values())).device):
        trainer = CohortTrainer(model, parameters, spec.trainable, settings, through, features, 2**20)
        try:
            if _tried(trainer, parameters, spec, encoder, start, sample):
                return trainer
        finally:
            features.close()  # those of the trial are of no client
    raise NotStackable("its layers mix examples in a way that cannot be kept apart")


def _passes(
    model: TunableModel, unit: str | None, encoder: Encoder, sample: ClientData, device: torch.device
) -> Iterator[Pass]:
    """Ways to try, the fastest first. unit: below which nothing ever changes."""
    starts = dict.fromkeys(
        [_first_position(model, encoder, sample, device), 0] if model.task.inputs.has_length else [0]
    )
    for cut in dict.fromkeys([unit, None]):
        for first in starts:
            try:
                yield Packed(model, cut, device, first)
            except NotPackable:
                break
        yield Padded(model, encoder, cut, device)


def _first_position(model: TunableModel, encoder: Encoder, sample: ClientData, device: torch.device) -> int:
    """The number of a text's first position, as the plain model asks its table of positions (RoBERTa's
    family counts from its padding place); 0 without a table.
    """
    seen: list[int] = []

    def note(module: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel():
            seen.append(int(args[0].min()))

    hooks = [
        m.register_forward_pre_hook(note)
        for name, m in model.body.named_modules()
        if isinstance(m, nn.Embedding) and "position" in name and "type" not in name
    ]
    try:
        with torch.no_grad():
            model(**to_batch(sample, np.arange(1), encoder, device)[0])
    finally:
        for hook in hooks:
            hook.remove()
    return min(seen, default=0)


def _tried(
    trainer: CohortTrainer,
    parameters: Parameters,
    spec: AdapterSpec,
    encoder: Encoder,
    start: Arrays,
    sample: ClientData,
) -> bool:
    """Two different models see the same examples: whether each gets the losses and the gradient of the plain
    model that holds its values.

    On success the trainer knows what a row (token or image) takes in memory,
    and which tensors have no part in the loss.
    """
    first, draw = (
        np.concatenate([start[t.name].ravel() for t in spec.trainable]).astype(np.float32),
        np.random.default_rng(0),
    )
    shift = [
        draw.standard_normal(t.size) * (0.1 * float(start[t.name].std()) or 0.02) for t in spec.trainable
    ]
    both = np.stack([first, first + np.concatenate(shift).astype(np.float32)])
    places = np.arange(len(sample))
    task = Task("", sample, [places])
    part = join([(0, task, places), (1, task, places)], trainer.model.task)
    order = np.argsort(part.lengths, kind="stable")
    ordered, rows = part.take(order), int(part.lengths.sum())
    try:
        with trainer.running([task]), kept_bytes(trainer.model) as kept:
            flat, scores = trainer.gradients(torch.from_numpy(both).to(trainer.device), ordered, ordered.row)
    except (
        NotPackable,
        NotStackable,
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AssertionError,
        AttributeError,
    ) as e:
        if isinstance(e, torch.OutOfMemoryError) or "allocate" in str(e):
            raise EnvironmentProblem(
                f"the base does not fit in memory with {len(part)} examples "
                f"({' '.join(str(e).split())[:120]}); free some, or lower model.max-length"
            ) from None
        return False
    found = np.empty(len(part))
    found[order] = scores[:, 0]
    for i, values in enumerate(both):
        losses, gradient, unused = _plain(trainer.model, parameters, spec, values, sample, encoder)
        if not np.allclose(found[i * len(sample) : (i + 1) * len(sample)], losses, rtol=LOSS, atol=LOSS):
            return False
        if not np.linalg.norm(flat[i].cpu().numpy() - gradient) <= GRADIENT * np.linalg.norm(gradient) + 1e-7:
            return False
    trainer.chunk = max(1, CHUNK_BYTES * rows // max(1, sum(kept.values())))
    trainer.unused = unused
    return True


def _plain(
    model: TunableModel,
    parameters: Parameters,
    spec: AdapterSpec,
    values: np.ndarray,
    data: ClientData,
    encoder: Encoder,
) -> tuple[np.ndarray, np.ndarray, frozenset[str]]:
    """From the plain model with these values [P]: summed loss of each example [n], gradient [P] of their
    mean, and the tensors without a part in it.
    """
    write(parameters, dict(Pieces(values, spec.schema.layout)))
    batch, labels = to_batch(data, np.arange(len(data)), encoder, device_of(model))
    loss, _, count = model.loss(model(**batch), batch, labels)
    found = torch.autograd.grad(
        loss.sum() / count.sum().clamp(min=1), list(parameters.values()), allow_unused=True
    )
    gradients = {
        name: np.zeros(p.shape, np.float32) if g is None else g.cpu().numpy()
        for (name, p), g in zip(parameters.items(), found)
    }
    unused = frozenset(name for name, g in zip(parameters, found) if g is None)
    return (
        loss.detach().cpu().numpy(),
        np.concatenate([gradients[t.name].ravel() for t in spec.trainable]),
        unused,
    )


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
