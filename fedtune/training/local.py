"""Local training: what one client does with the model in one round. The truth for every engine."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedtune.adapters.methods import Parameters
from fedtune.data.encoded import ClientData, Encoder
from fedtune.job import FederationSection
from fedtune.models.base import TunableModel
from fedtune.round.batches import local_batches
from fedtune.round.rates import learning_rate
from fedtune.stateful.base import Pull
from fedtune.training.lean import Lean
from fedtune.types import Arrays, Metrics

TINY = 1e-12
"""Added to the length of a gradient that is divided by it."""


def to_batch(
    data: ClientData, index: np.ndarray, encoder: Encoder, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], Tensor]:
    """The chosen examples, padded to the longest of them, with their labels."""
    arrays = encoder.collate([data.encoded[i] for i in index])
    return {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}, torch.from_numpy(
        data.labels[index]
    ).to(device)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model's numbers lie."""
    return next(model.parameters()).device


def train_locally(
    model: TunableModel,
    parameters: Parameters,
    data: ClientData,
    encoder: Encoder,
    settings: FederationSection,
    round: int,
    rng: np.random.Generator,
    pull: Pull | None = None,
) -> Metrics:
    """Runs the round's optimizer steps on `parameters` in place, with a fresh optimizer. pull:
    None is that of federation.proximal.

    The loss of a step is the mean over the predictions of its batch. Dropout is off:
    the model is in eval mode.

    Returns:
        loss and accuracy as seen before each step, summed over predictions.
    """
    optimizer = make_optimizer(parameters, settings, round)
    totals, device = torch.zeros(3, dtype=torch.float64), device_of(model)
    lean = Lean(model, settings.lean == "exact") if settings.lean != "off" and device.type == "cpu" else None
    pulled = Pulled(model, parameters, Pull(settings.proximal) if pull is None else pull)

    def around() -> AbstractContextManager:
        return lean.running() if lean else nullcontext()

    for index in local_batches(
        data.lengths, settings.batch_size, settings.local_epochs, settings.local_steps, rng
    ):
        batch, labels = to_batch(data, index, encoder, device)
        totals += step(
            model, optimizer, batch, labels, around(), partial(pulled, batch, labels, around)
        ).cpu()
        pulled.hold()
    loss, correct, count = totals.tolist()
    return {"loss": (loss, count), "accuracy": (correct, count)}


class Pulled:
    """Changes the gradients of a step as `Pull` says.

    With strength alone that is FedProx's term (Li et al. 2020, arXiv:1812.06127, equation 2).
    """

    def __init__(self, model: TunableModel, parameters: Parameters, pull: Pull) -> None:
        self.model, self.parameters, self.pull = model, parameters, pull
        self._towards = (
            self._tensors(pull.towards)
            if pull.towards is not None
            else {name: p.detach().clone() for name, p in parameters.items() if pull.strength}
        )
        self._offset = self._tensors(pull.offset or {})
        self._still = {
            name: (m == 0, parameters[name].detach().clone())
            for name, m in self._tensors(pull.moving or {}).items()
        }

    def __call__(
        self, batch: Mapping[str, Tensor], labels: Tensor, around: Callable[[], AbstractContextManager]
    ) -> None:
        """After the backward pass on this batch."""
        if not (self._towards or self._offset or self.pull.ascent):
            return
        if self.pull.ascent:
            self._climb(batch, labels, around)
        for name, p in self.parameters.items():
            if p.grad is not None and self.pull.strength:
                p.grad += self.pull.strength * (p.detach() - self._towards[name])
            if p.grad is not None and name in self._offset:
                p.grad += self._offset[name]

    def hold(self) -> None:
        """After the optimizer's step, weight decay included: what is not to move is where it was."""
        with torch.no_grad():
            for name, (still, begin) in self._still.items():
                self.parameters[name].copy_(torch.where(still, begin, self.parameters[name]))

    def _climb(
        self, batch: Mapping[str, Tensor], labels: Tensor, around: Callable[[], AbstractContextManager]
    ) -> None:
        """Puts the gradients from a step of length `ascent` uphill in the place of those from here."""
        slopes = [(p, p.grad) for p in self.parameters.values() if p.grad is not None]
        here = [p.detach().clone() for p, _ in slopes]
        length = torch.sqrt(
            sum((torch.square(g).sum() for _, g in slopes), torch.zeros((), device=labels.device))
        )
        with torch.no_grad():
            for p, g in slopes:
                p += self.pull.ascent / (length + TINY) * g
                p.grad = None
        with around():
            loss, _, count = self.model.loss(self.model(**batch), batch, labels)
        (loss.sum() / count.sum()).backward()
        with torch.no_grad():
            for (p, _), was in zip(slopes, here):
                p.copy_(was)

    def _tensors(self, arrays: Arrays) -> Parameters:
        return {
            name: torch.from_numpy(arrays[name]).to(p.device)
            for name, p in self.parameters.items()
            if name in arrays
        }


def batch_gradients(
    model: TunableModel,
    parameters: Parameters,
    data: ClientData,
    encoder: Encoder,
    settings: FederationSection,
    batches: Iterable[np.ndarray],
) -> Iterator[dict[str, np.ndarray]]:
    """Gradients of the mean loss of each batch to `parameters`, which stay as they are.

    Batches without predictions are left out.
    """
    device = device_of(model)
    lean = Lean(model, settings.lean == "exact") if settings.lean != "off" and device.type == "cpu" else None
    for index in batches:
        for p in parameters.values():
            p.grad = None
        batch, labels = to_batch(data, index, encoder, device)
        with lean.running() if lean else nullcontext():
            loss, _, count = model.loss(model(**batch), batch, labels)
        if count.sum() > 0:
            (loss.sum() / count.sum()).backward()
            yield {
                name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.cpu().numpy()
                for name, p in parameters.items()
            }


@contextmanager
def only(parameters: Parameters, names: Collection[str] | None) -> Iterator[Parameters]:
    """These parameters (None: all), in the order they had. Inside, no others have gradients: a backward pass
    ends at the lowest of them, and nothing is kept for the rest.
    """
    if names is None:
        yield parameters
        return
    chosen, others = (
        {n: p for n, p in parameters.items() if n in names},
        [p for n, p in parameters.items() if n not in names],
    )
    for p in others:
        p.requires_grad_(False)
    try:
        yield chosen
    finally:
        for p in others:
            p.requires_grad_(True)
        for p in chosen.values():  # the next round may train others
            p.grad = None


def step(
    model: TunableModel,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor],
    labels: Tensor,
    around: AbstractContextManager | None = None,
    pull: Callable[[], None] = lambda: None,
) -> Tensor:
    """One optimizer step, its forward pass inside `around`; `pull` may add to the gradients.

    Returns float64 [summed loss, right predictions, predictions].
    """
    optimizer.zero_grad(set_to_none=True)
    with around or nullcontext():
        loss, correct, count = model.loss(model(**batch), batch, labels)
    predictions = count.sum()
    if predictions > 0:  # a batch of one-token texts predicts nothing
        (loss.sum() / predictions).backward()
        pull()
        optimizer.step()
    return torch.stack([loss.detach().sum(), correct.sum(), predictions]).double()


def make_optimizer(parameters: Parameters, settings: FederationSection, round: int) -> torch.optim.Optimizer:
    """The job's optimizer at this round's learning rate; the head may have its own."""
    rates = {name: learning_rate(settings, name, round) for name in parameters}
    groups: list[dict] = [
        {"params": [parameters[name] for name in rates if rates[name] == lr], "lr": lr}
        for lr in dict.fromkeys(rates.values())
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)  # adam too: the two are one here


def weight_gradients(
    model: TunableModel,
    names: Iterable[str],
    data: ClientData,
    encoder: Encoder,
    index: np.ndarray,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Gradient of the mean loss over `index` to the weights of the named linears of an un-adapted
    base, [outputs, inputs].
    """
    with base_weights(model, names) as weights:
        total = 0.0
        for start in range(0, len(index), batch_size):
            batch, labels = to_batch(data, index[start : start + batch_size], encoder)
            loss, _, count = model.loss(model(**batch), batch, labels)
            loss.sum().backward()
            total += float(count.sum())
        return {
            name: (w.grad / max(total, 1.0)).numpy().copy()
            for name, w in weights.items()
            if w.grad is not None
        }


@contextmanager
def base_weights(model: TunableModel, names: Iterable[str]) -> Iterator[Parameters]:
    """The weights of the named linears of an un-adapted base, which inside have gradients."""
    weights = {name: model.linear(name).weight for name in names}
    for w in weights.values():
        w.requires_grad_(True)
    try:
        yield weights
    finally:
        for w in weights.values():
            w.requires_grad_(False)
            w.grad = None
