"""Local training with example-level privacy: what one client does in one round. The truth for every engine.

Gradients of single examples come from Opacus where it can give them, which is tried before it is believed;
else from one backward pass for each example, the slow and obvious way.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.adapters.methods import Parameters
from fedtune.data.encoded import ClientData, Encoder
from fedtune.job import FederationSection
from fedtune.models.base import TunableModel
from fedtune.privacy.clipping import SHRINK
from fedtune.privacy.example import (
    ExamplePrivacy,
    SelfCheck,
    capped,
    drawn_noise,
    noisy_metrics,
    poisson_batches,
)
from fedtune.privacy.noise import Noise
from fedtune.training.local import base_weights, device_of, make_optimizer, to_batch
from fedtune.types import Metrics

PHYSICAL, NUMBERS = 32, 2**26
"""Most examples that go through the base at once, and most numbers of their gradients, which are held side by
side, however large the batch of a step is.
"""
TRIED = 3
"""Examples of a first batch whose gradients are computed both ways."""
_SAMPLED = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv1d, nn.Conv2d)
"""Layers whose gradient by example Opacus knows, and which compute the same in training mode,
in which alone it watches them.
"""


class Audit(Protocol):
    """Tries the mechanism from inside, for `fedtune privacy audit` alone;
    where there is none nothing differs.
    """

    def insert(
        self, rows: np.ndarray, labels: np.ndarray, real: Callable[[np.ndarray], tuple[Tensor, Any]]
    ) -> tuple[Tensor, Tensor]:
        """Gradients [n, P], before they are clipped, and scores [n, 3] of examples of the clients int64
        [n] of this step and with labels [n], an audit's own among them; `real` gives those of the examples
        at some of these places.
        """
        ...

    def released(self, row: int, client: str, gradient: Tensor) -> None:
        """What the optimizer of a client gets in the step: the noisy sum over the public
        number of examples, [P].
        """
        ...


@dataclass
class PerExample:
    """Gradients by example. Made once for a model with its adapter on it.

    Args:
        parameters: the trained tensors; a gradient [P] holds them in this order.
    """

    model: TunableModel
    parameters: Parameters
    by_hooks: bool | None = field(default=None)
    """Whether Opacus' hooks are used: None until they were tried."""
    audit: Audit | None = None

    def __call__(self, batch: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of each example's mean loss over its predictions, [n, P], and its [loss,
        right, 1], [n, 3], means too.
        """
        if self.audit is None:
            return self._computed(batch, labels)
        rows = np.zeros(len(labels), np.int64)
        return self.audit.insert(
            rows,
            labels.cpu().numpy(),
            lambda places: self._computed({k: v[places] for k, v in batch.items()}, labels[places]),
        )

    def _computed(self, batch: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.by_hooks is None:
            self.by_hooks = self._agree({k: v[:TRIED] for k, v in batch.items()}, labels[:TRIED])
        return self.with_opacus(batch, labels) if self.by_hooks else self.one_by_one(batch, labels)

    def one_by_one(self, batch: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """One backward pass for each example."""
        rows, scores = [], []
        for i in range(len(labels)):
            loss, score = self._losses({k: v[i : i + 1] for k, v in batch.items()}, labels[i : i + 1])
            found = torch.autograd.grad(
                loss.sum(), list(self.parameters.values()), allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([g.flatten() for g in found]))
            scores.append(score)
        return torch.stack(rows), torch.cat(scores)

    def with_opacus(self, batch: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """One backward pass for all. Raises what Opacus raises for layers it does not know."""
        n = len(labels)
        with self._watched():
            loss, scores = self._losses(batch, labels)
            loss.sum().backward()
            found = [getattr(p, "grad_sample", None) for p in self.parameters.values()]
        if any(g is not None and (not isinstance(g, Tensor) or len(g) != n) for g in found):
            raise ValueError("a layer mixes examples")
        return torch.cat(
            [
                torch.zeros(n, p.numel(), device=p.device) if g is None else g.reshape(n, -1)
                for g, p in zip(found, self.parameters.values())
            ],
            1,
        ), scores

    def _losses(self, batch: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, correct, count = self.model.loss(self.model(**batch), batch, labels)
        made = count.clamp(min=1)
        return loss / made, torch.stack([loss.detach() / made, correct / made, torch.ones_like(loss)], 1)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        from opacus.grad_sample import GradSampleHooks

        owners = {
            m: m.training
            for m in self.model.modules()
            if any(p.requires_grad for p in m.parameters(recurse=False))
        }
        if not all(isinstance(m, _SAMPLED) for m in owners):
            raise TypeError("a trained layer without a known gradient by example")
        hooks = GradSampleHooks(self.model, loss_reduction="sum", strict=False)
        try:
            for m in owners:
                m.training = True
            # the lowest trained layer's input needs no gradient, which torch finds worth a word
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                yield
        finally:
            hooks.remove_hooks()
            for m, before in owners.items():
                m.training = before
                m.__dict__.pop("activations", None)
            for p in self.parameters.values():
                p.grad = None
                for name in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                    p.__dict__.pop(name, None)

    def _agree(self, batch: Mapping[str, Tensor], labels: Tensor) -> bool:
        """Whether Opacus gives what one pass for each example gives."""
        try:
            fast = self.with_opacus(batch, labels)[0]
        except (
            ImportError,
            TypeError,
            ValueError,
            RuntimeError,
            LookupError,
            AttributeError,
            NotImplementedError,
            AssertionError,
        ):
            return False
        slow = self.one_by_one(batch, labels)[0]
        return bool((fast - slow).norm() <= 1e-3 * slow.norm() + 1e-7)


def train_privately(
    gradients: PerExample,
    data: ClientData,
    encoder: Encoder,
    settings: FederationSection,
    privacy: ExamplePrivacy,
    round: int,
    noise: Noise,
    client: str = "",
) -> Metrics:
    """DP-SGD on `gradients.parameters`, in place, with a fresh optimizer;
    empty batches make a step of noise alone.

    Args:
        client: whose data it is, as an audit knows it.

    Returns:
        Noisy training metrics, or none where the job sends none.

    Raises Refused when the mechanism did not do what it promises: nothing may then leave.
    """
    parameters = gradients.parameters
    optimizer, check = make_optimizer(parameters, settings, round), SelfCheck(privacy)
    totals, start = np.zeros(3), _flat(parameters)
    for index in poisson_batches(len(data), privacy, noise):
        released, scores = _noisy_mean(gradients, data, encoder, index, check, noise)
        totals += scores
        if gradients.audit is not None:
            gradients.audit.released(0, client, released)
        if settings.proximal:  # it looks at no example, so it is added to what is released
            released = released + settings.proximal * torch.from_numpy(_flat(parameters) - start).to(
                released.device
            )
        _put(parameters, released)
        optimizer.step()
    check.require(start, _flat(parameters))
    return noisy_metrics(totals, privacy, noise)


def private_gradients(
    model: TunableModel,
    names: Sequence[str],
    data: ClientData,
    encoder: Encoder,
    privacy: ExamplePrivacy,
    noise: Noise,
) -> dict[str, np.ndarray]:
    """As `local.weight_gradients` of a batch that is drawn here, with noise: one step of DP-SGD that moves
    nothing, [outputs, inputs] by name.

    One clip holds over all weights together. Raises Refused as `train_privately`.
    """
    check = SelfCheck(privacy)
    with base_weights(model, names) as weights:
        (index,) = poisson_batches(len(data), privacy, noise)
        mean = _noisy_mean(PerExample(model, weights), data, encoder, index, check, noise)[0].cpu()
    check.require(np.zeros(len(mean), np.float32), mean.numpy())
    return {
        name: part.view_as(weights[name]).numpy()
        for name, part in zip(names, mean.split([weights[name].numel() for name in names]))
    }


def _noisy_mean(
    gradients: PerExample,
    data: ClientData,
    encoder: Encoder,
    index: np.ndarray,
    check: SelfCheck,
    noise: Noise,
) -> tuple[Tensor, np.ndarray]:
    """(sum of the clipped gradients of the examples at `index`, with noise, over the public number of
    examples [P]; sum of their capped scores, float64 [3]).
    """
    privacy, device, sizes = (
        check.settings,
        device_of(gradients.model),
        [p.numel() for p in gradients.parameters.values()],
    )
    total, scores = torch.zeros(sum(sizes), device=device), np.zeros(3)
    physical = max(1, min(PHYSICAL, NUMBERS // len(total)))
    for begin in range(0, len(index), physical):
        flat, seen = gradients(*to_batch(data, index[begin : begin + physical], encoder, device))
        total += clipped(flat, privacy.clip, check).sum(0)
        scores += capped(seen.double().cpu().numpy()).sum(0)
    noisy = total + torch.from_numpy(drawn_noise(sizes, privacy, noise)).to(device)
    check.noise((noisy - total).cpu().numpy())
    return noisy / privacy.batch, scores


def clipped(flat: Tensor, bound: float, check: SelfCheck) -> Tensor:
    """Gradients [n, P] cut to an L2 norm of at most `bound`, one by one; one that is not finite becomes 0.

    Overwrites `flat`.
    """
    # over millions of numbers, float32 finds too little
    norms = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    flat[~torch.isfinite(norms)] = 0.0
    flat *= (bound * SHRINK / norms.clamp(min=1e-30)).clamp(max=1.0).nan_to_num(0.0).to(flat.dtype)[:, None]
    check.clipped(torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).cpu().numpy())
    return flat


def _flat(parameters: Parameters) -> np.ndarray:
    return np.concatenate([p.detach().cpu().numpy().ravel() for p in parameters.values()])


def _put(parameters: Parameters, gradient: Tensor) -> None:
    sizes: Sequence[int] = [p.numel() for p in parameters.values()]
    for p, part in zip(parameters.values(), gradient.split(list(sizes))):
        p.grad = part.view_as(p).clone()
