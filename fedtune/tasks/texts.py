"""Texts, and the task of saying which label a text has."""

import numpy as np

from fedtune.tasks.base import Inputs, Targets, Task
from fedtune.types import Arrays

TEXTS = Inputs("texts", "text", '"a text"', has_length=True, in_folder=False)


def labels_of(batch: Arrays, labels: np.ndarray) -> Targets:
    """One prediction for each example: its label."""
    return Targets(np.ones(len(labels), bool), labels)


def one_each(lengths: np.ndarray) -> np.ndarray:
    return np.ones_like(lengths)


TEXT_CLASSIFICATION = Task("text-classification", TEXTS, labels_of, one_each)
