"""The losses of the tasks in torch, found by what a task predicts when a model is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedtune.tasks.texts import labels_of
from fedtune.tasks.tokens import next_tokens

Scores = tuple[Tensor, Tensor, Tensor]
"""(summed loss, right predictions, predictions made) of each example, each float32 [n]."""


@dataclass(frozen=True)
class Loss:
    """The torch twin of a task's loss.

    Attributes:
        by_example: from logits, an encoded batch of n examples and labels, int64 [n]. A task with a head is
            asked with an empty batch where its texts went through the base in one row.
        packed: of a task without a head, for n texts in one long row: from logits [tokens, vocabulary], token
            ids [tokens], the place of each text's first token, int64 [n], and lengths, int64 [n].
    """

    by_example: Callable[[Tensor, Mapping[str, Tensor], Tensor], Scores]
    packed: Callable[[Tensor, Tensor, Tensor, np.ndarray], Scores] | None = None


def by_label(logits: Tensor, batch: Mapping[str, Tensor], labels: Tensor) -> Scores:
    """Cross-entropy of one prediction an example. logits: [n, classes]."""
    loss = cross_entropy(logits, labels, reduction="none")
    return loss, (logits.argmax(-1) == labels).float(), torch.ones_like(loss)


def by_token(logits: Tensor, batch: Mapping[str, Tensor], labels: Tensor) -> Scores:
    """Cross-entropy of one prediction per token after the first. logits: [n, length, vocabulary]."""
    targets, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:].float()
    predicted = logits[:, :-1]
    loss = cross_entropy(predicted.transpose(1, 2), targets, reduction="none") * mask
    correct = (predicted.argmax(-1) == targets).float() * mask
    return loss.sum(1), correct.sum(1), mask.sum(1)


def by_token_of_a_row(logits: Tensor, ids: Tensor, starts: Tensor, lengths: np.ndarray) -> Scores:
    """The same for texts one after another."""
    targets = torch.roll(ids, -1)
    sizes = torch.from_numpy(lengths).to(logits.device)
    # the last token of a text predicts nothing
    keep = torch.ones(len(ids), device=logits.device).index_fill_(0, starts + sizes - 1, 0.0)
    text = torch.repeat_interleave(torch.arange(len(sizes), device=logits.device), sizes)

    def by_text(x: Tensor) -> Tensor:
        return torch.zeros(len(sizes), device=x.device).index_add(0, text, x * keep)

    loss = cross_entropy(logits, targets, reduction="none")
    return by_text(loss), by_text((logits.argmax(-1) == targets).float()), (sizes - 1).float()


LOSSES: Mapping[Any, Loss] = {labels_of: Loss(by_label), next_tokens: Loss(by_token, by_token_of_a_row)}
"""By `Task.targets`."""
