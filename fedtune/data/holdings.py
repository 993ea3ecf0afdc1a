"""What a split gives its clients, in figures: of some clients one by one,
of all together, and as one digest.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fedtune.data.examples import Dataset
from fedtune.data.partition import Split

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_AT_ONCE = 4096  # texts joined for one step of a digest


def describe(split: Split, dataset: Dataset, places: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """One row per client, or per client at these places: name, natural value ("" if mixed or none), rows of
    each side, training rows per label name.
    """
    return [
        _describe(split, dataset, place)
        for place in (range(len(split.clients)) if places is None else places)
    ]


def _describe(split: Split, dataset: Dataset, place: int) -> dict[str, Any]:
    examples, train = dataset.examples, split.train[place]
    natural = {examples.natural[row] for row in train.tolist()} if examples.natural else set()
    counts = np.bincount(examples.labels[train], minlength=len(dataset.label_names))
    return {
        "name": split.clients[place],
        "natural": natural.pop() if len(natural) == 1 else "",
        "train": len(train),
        "held_out": len(split.held_out[place]),
        "labels": counts.tolist() if dataset.label_names else [],
    }


def population(split: Split, dataset: Dataset) -> dict[str, Any]:
    """All clients together: how many, their rows of each side, training rows per label name,
    and quantiles of a client's rows.
    """
    train, held_out = split.train.sizes, split.held_out.sizes
    counts = np.bincount(dataset.examples.labels[split.train.rows], minlength=len(dataset.label_names))
    return {
        "clients": len(split.clients),
        "train": int(train.sum()),
        "held_out": int(held_out.sum()),
        "labels": counts.tolist() if dataset.label_names else [],
        "quantiles": list(QUANTILES),
        "train_quantiles": _quantiles(train),
        "held_out_quantiles": _quantiles(held_out),
    }


def digest(split: Split, dataset: Dataset, inputs: bool) -> str:
    """sha256 of who holds which rows, and of the rows: ids, labels, natural values, and texts where `inputs`.

    Paths of images are left out: the same folder may stand elsewhere.
    """
    found, examples = hashlib.sha256(), dataset.examples
    for array in (
        split.train.offsets,
        split.train.rows,
        split.held_out.offsets,
        split.held_out.rows,
        examples.labels,
    ):
        found.update(array.astype("<i8").tobytes())
    for texts in (
        split.clients,
        dataset.label_names,
        examples.ids,
        examples.natural,
        examples.inputs if inputs else (),
    ):
        _add(found, texts)
    return found.hexdigest()


def _add(found: Any, texts: Sequence[str]) -> None:
    """Each text with its length before it, so that no two lists of texts look the same."""
    found.update(b"%d\n" % len(texts))
    for start in range(0, len(texts), _AT_ONCE):
        found.update(
            "".join(f"{len(text)}:{text}" for text in texts[start : start + _AT_ONCE]).encode(
                "utf-8", "surrogatepass"
            )
        )


def _quantiles(sizes: np.ndarray) -> list[int]:
    """Sizes that clients do have, at QUANTILES."""
    return np.quantile(sizes, QUANTILES, method="nearest").astype(int).tolist()
