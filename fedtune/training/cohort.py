"""Local training of many clients together over one frozen base: the fast twin of `train_locally`,
client by client the same result.

All clients take step t together. Their examples go through the base in chunks, sorted by length whatever
client they are of, and the trained layers apply to each example its own client's values (`training.stacked`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedtune.adapters.layers.stacked import Examples
from fedtune.adapters.methods import Parameters
from fedtune.job import FederationSection
from fedtune.models.base import TunableModel
from fedtune.privacy.example import ExamplePrivacy, SelfCheck, capped
from fedtune.round.rates import learning_rate
from fedtune.training import optimizers
from fedtune.training.chunks import Picked, Task, balanced, join, pick, stretches
from fedtune.training.features import FeatureStore
from fedtune.training.local import TINY
from fedtune.training.passes import Pass
from fedtune.training.private import NUMBERS, Audit, clipped
from fedtune.training.stacked import Stack
from fedtune.types import TensorSpec
from fedtune.wire import Schema


@dataclass(frozen=True)
class Pulls:
    """A `fedtune.stateful.base.Pull` for each of K models, [K, 1] and [K, P];
    one ascent for all. moving: bool.
    """

    strength: Tensor
    towards: Tensor
    offset: Tensor | None = None
    ascent: float = 0.0
    moving: Tensor | None = None

    def take(self, rows: np.ndarray) -> "Pulls":
        return self._each(lambda x: x[rows])

    def on(self, device: torch.device) -> "Pulls":
        return self._each(lambda x: x.to(device))

    def _each(self, f: Callable[[Tensor], Tensor]) -> "Pulls":
        offset, moving = (None if x is None else f(x) for x in (self.offset, self.moving))
        return replace(self, strength=f(self.strength), towards=f(self.towards), offset=offset, moving=moving)

    def add(self, gradients: Tensor, models: Tensor) -> Tensor:
        """The gradients of the first len(models) with what is added to them."""
        k = len(models)
        gradients = gradients + self.strength[:k] * (models - self.towards[:k])
        return gradients if self.offset is None else gradients + self.offset[:k]


class CohortTrainer:
    """Trains clients together. Made once per run, used from one thread.

    Args:
        model: the base with its adapter on it; `parameters` as `attach` returned them.
        trainable: tensors in the order of the numbers of a flat model [P].
        through: how examples go through the base.
        features: where the outputs of the untrained part are kept, with through.unit.
        chunk: rows (tokens, or images) that go through the base at once.

    Raises NotStackable.
    """

    def __init__(
        self,
        model: TunableModel,
        parameters: Parameters,
        trainable: Sequence[TensorSpec],
        settings: FederationSection,
        through: Pass,
        features: FeatureStore,
        chunk: int,
    ) -> None:
        self.model, self.schema, self.settings = model, Schema(tuple(trainable)), settings
        self.through, self.features, self.chunk = through, features, chunk
        self.unused: frozenset[str] = frozenset()
        """Tensors without a part in the loss: an optimizer leaves them alone, weight decay included."""
        self.audit: Audit | None = None
        self.stack = Stack(model, parameters)
        self.device = self.stack.device
        ends = np.cumsum([t.size for t in trainable]).tolist()
        self._spans = [(t.name, t.shape, end - t.size, end) for t, end in zip(trainable, ends)]

    def train(
        self,
        start: np.ndarray,
        tasks: Sequence[Task],
        round: int,
        private: ExamplePrivacy | None = None,
        pulls: Pulls | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """All tasks, from one model or each from its own.

        Args:
            start: float32 [P], or [len(tasks), P].
            pulls: of each task; None is that of federation.proximal.
            round: from 1; sets the learning rate.
            private: as `train_privately` for each task, which then has its noise and all batches of
                the round, also empty ones.

        Returns:
            Trained models, float32 [len(tasks), P], and of each float64 [summed loss, right predictions,
            predictions], as seen before each step (with `private`: of means by example, capped).
        """
        # who still trains is then always a first stretch
        ranked = sorted(range(len(tasks)), key=lambda i: -len(tasks[i].batches))
        ordered = [tasks[i] for i in ranked]
        begin = torch.from_numpy(start if start.ndim == 1 else start[ranked]).to(self.device)
        models = begin.repeat(len(tasks), 1) if begin.ndim == 1 else begin.clone()
        pulled = None if pulls is None else pulls.take(np.array(ranked)).on(self.device)
        totals = np.zeros((len(tasks), 3))
        moments, rates = optimizers.start(models, self.settings), self._rates(round)
        mask = None if private else self._mask(ordered)
        if pulled is not None and pulled.moving is not None:
            mask = pulled.moving if mask is None else pulled.moving & mask
        check = SelfCheck(private) if private else None
        with self.running(ordered):
            for step in range(len(ordered[0].batches) if ordered else 0):
                active = sum(len(task.batches) > step for task in ordered)
                picked = pick(ordered[:active], step, self.model.task)
                if check is None:
                    gradients = self._step(models[:active], picked, totals)
                    if pulled is not None and pulled.ascent:
                        length = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
                        gradients = self._step(
                            models[:active] + pulled.ascent / (length + TINY) * gradients,
                            picked,
                            np.zeros_like(totals),
                        )
                else:
                    gradients = self._private_step(models, picked, totals, check, ordered)
                if pulled is not None:
                    gradients = pulled.add(gradients, models[:active])
                elif self.settings.proximal:
                    gradients = gradients + self.settings.proximal * (models[:active] - begin)
                optimizers.update(models[:active], gradients, moments, rates, step + 1, self.settings)
                if mask is not None:
                    torch.where(
                        mask[:active],
                        models[:active],
                        begin if begin.ndim == 1 else begin[:active],
                        out=models[:active],
                    )
        back, trained = np.argsort(ranked), models.cpu().numpy()
        if check is not None:
            for model in trained:
                check.require(start, model)
        return trained[back], totals[back]

    @contextmanager
    def running(self, tasks: Sequence[Task]) -> Iterator[None]:
        """Inside, the base runs stacked, with the features of these tasks at hand."""
        with self.through.running():
            self._keep_features(tasks)
            with self.stack.installed():
                yield

    def _step(self, models: Tensor, picked: Picked, totals: np.ndarray) -> Tensor:
        """Gradients [K, P] of one step, chunk by chunk; adds to `totals`."""
        parts = list(self._chunks(picked))
        if len(parts) == 1:  # all models take part
            flat, scores = self.gradients(models, parts[0], parts[0].row)
            np.add.at(totals, parts[0].row, scores)
            return flat
        gradients = torch.zeros_like(models)
        for part in parts:
            rows, owner = np.unique(part.row, return_inverse=True)
            index = torch.from_numpy(rows).to(self.device)
            flat, scores = self.gradients(models[index], part, owner)
            gradients.index_add_(0, index, flat)
            np.add.at(totals, part.row, scores)
        return gradients

    def _private_step(
        self, models: Tensor, picked: Picked, totals: np.ndarray, check: SelfCheck, tasks: Sequence[Task]
    ) -> Tensor:
        """The same with example-level privacy.

        Every example has a model of its own in the stack, whose gradients are then the examples'.
        """
        private, gradients = check.settings, torch.zeros_like(models)
        made = self.model.task.predictions(picked.lengths).astype(np.float32)
        means = replace(picked, scale=1 / np.maximum(made, 1))
        for chunk in self._chunks(means):
            for begin in range(0, len(chunk), most := max(1, NUMBERS // models.shape[1])):
                part = chunk.take(np.arange(begin, min(begin + most, len(chunk))))
                flat, scores = self._singly(models, part)
                gradients.index_add_(
                    0, torch.from_numpy(part.row).to(self.device), clipped(flat, private.clip, check)
                )
                np.add.at(totals, part.row, capped(scores / np.maximum(scores[:, 2:], 1)))
        noises = [task.noise for task in tasks if task.noise is not None]
        assert len(noises) == len(tasks), "a client without noise"
        drawn = np.stack(
            [private.multiplier * private.clip * noise.normal(models.shape[1]) for noise in noises]
        ).astype(np.float32)
        noisy = gradients + torch.from_numpy(drawn).to(self.device)
        check.noise((noisy - gradients).cpu().numpy())
        released = noisy / private.batch
        if self.audit is not None:
            for row, (task, gradient) in enumerate(zip(tasks, released)):
                self.audit.released(row, task.client, gradient)
        return released

    def _singly(self, models: Tensor, part: Picked) -> tuple[Tensor, np.ndarray]:
        """Gradient of each example's scale * loss by the model of its row, [n, P],
        and its scores, float64 [n, 3].
        """

        def computed(examples: Picked) -> tuple[Tensor, np.ndarray]:
            return self.gradients(
                models[torch.from_numpy(examples.row).to(self.device)], examples, np.arange(len(examples))
            )

        if self.audit is None:
            return computed(part)
        flat, scores = self.audit.insert(part.row, part.labels, lambda places: computed(part.take(places)))
        return flat, scores.numpy()

    def gradients(self, models: Tensor, part: Picked, owner: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Gradient of each model's sum of scale * loss over its examples.

        Args:
            models: [K, P].
            owner: int64 [n], the model of each example.

        Returns:
            [K, P] (0 for a tensor without a part in the loss), and float64 [n, 3]: loss,
            right predictions, predictions.
        """
        values = {
            name: models[:, a:b].view(len(models), *shape).detach().requires_grad_()
            for name, shape, a, b in self._spans
        }
        self.stack.set(values, Examples(owner, len(models), self.through.rows(part.lengths), self.device))
        loss, correct, count = self.through.loss(part.encoded, part.labels, self._features(part))
        weighted = (loss * torch.from_numpy(part.scale).to(self.device)).sum()
        found = torch.autograd.grad(
            weighted, list(values.values()), allow_unused=True, materialize_grads=True
        )
        flat = torch.empty_like(models)
        for g, (_, shape, a, b) in zip(found, self._spans):
            flat[:, a:b].view(len(models), *shape).copy_(g)
        return flat, torch.stack([loss.detach(), correct, count], 1).double().cpu().numpy()

    def _chunks(self, picked: Picked) -> Iterator[Picked]:
        """The examples in pieces of at most `chunk` rows: texts by length, images by client."""
        texts = self.model.task.inputs.has_length
        order = np.argsort(picked.lengths if texts else picked.row, kind="stable")
        for index in stretches(picked.lengths[order], self.chunk, texts and self.through.padded):
            yield from balanced(picked.take(order[index]))

    def _features(self, part: Picked) -> list[np.ndarray] | None:
        """The features of all of a chunk; those not kept are made again."""
        if self.through.unit is None:
            return None
        found = [self.features.get(key) for key in part.keys]
        if any(f is None for f in found):
            return self.through.below(part.encoded)
        return found  # type: ignore[return-value]

    def _keep_features(self, tasks: Sequence[Task]) -> None:
        """Makes what is not kept yet of the examples these tasks will see; nothing where there is no room
        for all, as some would push out others.
        """
        if self.through.unit is None:
            return
        seen = [
            (row, task, np.unique(np.concatenate(task.batches)))
            for row, task in enumerate(tasks)
            if task.batches
        ]
        missing = [
            (
                row,
                task,
                np.array(
                    [i for i in index.tolist() if self.features.get((task.client, i)) is None], np.int64
                ),
            )
            for row, task, index in seen
        ]
        parts = iter(
            self._chunks(join(missing, self.model.task)) if any(len(index) for _, _, index in missing) else ()
        )
        for number, part in enumerate(parts):
            values = self.through.below(part.encoded)
            if number == 0 and not self.features.fits(
                int(
                    sum(v.nbytes for v in values)
                    / self._rows([part.lengths])
                    * self._rows([_lengths(task, index) for _, task, index in seen])
                )
            ):
                return
            for key, value in zip(part.keys, values):
                self.features.put(key, value)

    def _rows(self, lengths: Sequence[np.ndarray]) -> int:
        """What the features' size goes with: tokens, or examples below the head and for images."""
        return sum(
            len(n) if self.through.unit == "head" else int(self.model.task.inputs.rows(n).sum())
            for n in lengths
        )

    def _rates(self, round: int) -> Tensor | float:
        """Learning rates of this round, float32 [P]; a number where all are the same."""
        of = [learning_rate(self.settings, t.name, round) for t in self.schema.tensors]
        if len(set(of)) == 1:
            return of[0]
        rates = [np.full(t.size, rate, np.float32) for t, rate in zip(self.schema.tensors, of)]
        return torch.from_numpy(np.concatenate(rates)).to(self.device)

    def _mask(self, tasks: Sequence[Task]) -> Tensor | None:
        """True [K, P] where a client trains the number; None when all train all."""
        if all(task.trained is None for task in tasks) and not self.unused:
            return None
        mask = torch.ones(len(tasks), self.schema.size, dtype=torch.bool)
        for row, task in zip(mask, tasks):
            for name, _, a, b in self._spans:
                row[a:b] = (task.trained is None or name in task.trained) and name not in self.unused
        return mask.to(self.device)


def _lengths(task: Task, index: np.ndarray) -> np.ndarray:
    return np.asarray(task.data.lengths, np.int64)[index]
