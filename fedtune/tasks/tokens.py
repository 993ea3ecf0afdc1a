"""The task of a causal language model: at each token of a text, the token after it."""

import numpy as np

from fedtune.tasks.base import UNLABELLED, Targets, Task
from fedtune.tasks.texts import TEXTS
from fedtune.types import Arrays


def next_tokens(batch: Arrays, labels: np.ndarray) -> Targets:
    """A prediction at each token; the last one's target is not known."""
    ids, rows = batch["input_ids"], batch["attention_mask"].astype(bool)
    classes = np.full_like(ids, UNLABELLED)
    classes[:, :-1][rows[:, 1:]] = ids[:, 1:][rows[:, 1:]]
    return Targets(rows, classes)


def one_per_token(lengths: np.ndarray) -> np.ndarray:
    """One for each token after the first."""
    return np.maximum(lengths - 1, 0)


CAUSAL_LM = Task(
    "causal-lm",
    TEXTS,
    next_tokens,
    one_per_token,
    has_head=False,
    answer="token",
    metric="next-token {}",
    scored="next tokens",
    pipeline="text-generation",
    peft="CAUSAL_LM",
)
