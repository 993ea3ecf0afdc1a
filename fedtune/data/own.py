"""Data of the caller's own, client by client, as the engines take it. numpy, without torch.

`data` maps the name of each client to its examples: a sequence, or a dataset with `__len__` and
`__getitem__`, of pairs (input, label). An input is a text, or an array (or what numpy makes one of, such as
a tensor) of at least one axis, all of one shape; a label is an integer from 0 on, or a string. A pair of
such datasets is training and held-out examples; of one dataset the job's `data.held-out` says how much is
held out, drawn by the seed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.common.seeds import generator
from fedtune.data.examples import OWN, Dataset, Examples
from fedtune.data.partition import Split
from fedtune.data.slices import Names, Slices
from fedtune.errors import ContractError, DataError

INPUT = "inputs"
"""The name of an example's array."""
OwnData = Mapping[str, Any]


Example = dict[str, np.ndarray]


@dataclass(frozen=True)
class ArrayEncoder:
    """Stands where the encoder of a base does, for examples that are arrays already: what names an input is
    its place in `items`, as `read` writes it. All items have one shape.
    """

    items: Sequence[Example]

    def encode(self, inputs: Sequence[str]) -> list[Example]:
        return [self.items[int(place)] for place in inputs]

    def lengths(self, inputs: Sequence[str]) -> list[int]:
        return [1] * len(inputs)

    def collate(self, encoded: Sequence[Mapping[str, np.ndarray]]) -> Example:
        """[n, *shape] by name."""
        return {key: np.stack([example[key] for example in encoded]) for key in encoded[0]}

    def made_up(self, lengths: Sequence[int], draw: np.random.Generator) -> list[Example]:
        return [self.items[int(draw.integers(len(self.items)))] for _ in lengths]

    def sides(self, lengths: Sequence[int]) -> Sequence[int]:
        return [1] * len(lengths)

    def span(self, tokens: int, images: int) -> int:
        return images

    def decode(self, place: int) -> str:
        raise ContractError("arrays hold no tokens")

    def to_config(self) -> dict[str, Any]:
        return {"shape": list(self.items[0][INPUT].shape)}

    def save(self, folder: Path) -> None:
        """Nothing: a device could not read what Python passed."""


def read(
    data: OwnData, labels: tuple[str, ...], held_out: float, seed: int
) -> tuple[Dataset, Split, ArrayEncoder | None]:
    """(examples of all clients, who holds which, their encoder: None where they are texts,
    which the base's encoder takes).

    Args:
        labels: names of the labels in order; empty takes those found:
            integers 0 to the largest, or strings sorted.

    Raises DataError naming the client and the example.
    """
    if not isinstance(data, Mapping) or not data:
        empty = " that holds nothing" if isinstance(data, Mapping) else ""
        raise DataError(
            f"data: is a {type(data).__name__}{empty}; give a mapping from the name "
            "of each client to its examples"
        )
    inputs, found, ids = list[Any](), list[Any](), list[str]()
    train, kept = list[np.ndarray](), list[np.ndarray]()
    for name, own in data.items():
        if not isinstance(name, str) or not name or len(name) > 200:
            raise DataError(f"data: {name!r} is no name of a client; give a string of at most 200 characters")
        parts = (
            own if isinstance(own, tuple) and len(own) == 2 and all(_sized(part) for part in own) else (own,)
        )
        rows = []
        for part in parts:
            begin = len(inputs)
            for place in range(_length(part, name)):
                one, label = _pair(part, place, name)
                inputs.append(one)
                found.append(label)
                ids.append(f"{name}/{len(ids)}")
            rows.append(np.arange(begin, len(inputs)))
        mine = _parted(rows[0], held_out, seed, name) if len(rows) == 1 else (rows[0], rows[1])
        if not len(mine[0]):
            raise DataError(
                f"data: client {name!r} has {len(rows[0])} examples, which leaves none to train on; "
                "give it at least one, two with held-out ones"
            )
        train.append(mine[0])
        kept.append(mine[1])
    names, values = _labels(found, labels, ids)
    texts, encoder = _inputs(inputs, ids)
    # what names an array says what it holds, so that a run is not gone on with on other data
    if encoder is not None:
        ids = [f"{one}:{_digest(item)}" for one, item in zip(ids, encoder.items)]
    dataset = Dataset(Examples(texts, values, tuple(ids)), names, OWN)
    return dataset, Split(Names(tuple(data)), Slices.of(train), Slices.of(kept)), encoder


def _sized(part: Any) -> bool:
    return (
        hasattr(part, "__len__")
        and hasattr(part, "__getitem__")
        and not isinstance(part, str | np.ndarray)
        and (not len(part) or _is_pair(part[0]))
    )


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2


def _length(part: Any, name: str) -> int:
    if not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
        raise DataError(
            f"data: client {name!r} has a {type(part).__name__}; give a sequence or a dataset "
            "with __len__ and __getitem__"
        )
    return len(part)


def _pair(part: Any, place: int, name: str) -> tuple[Any, Any]:
    item = part[place]
    if not _is_pair(item):
        raise DataError(
            f"data: example {place} of client {name!r} is a {type(item).__name__}; give a pair (input, label)"
        )
    return item[0], item[1]


def _parted(rows: np.ndarray, share: float, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Of one client: what it trains on and what is held out, at least one of two, ascending."""
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    chosen = np.sort(generator(seed, "held-out", client=name).permutation(len(rows))[: max(0, count)])
    return np.delete(rows, chosen), rows[chosen]


def _labels(
    found: Sequence[Any], names: tuple[str, ...], ids: Sequence[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    """(names, int64 [n])."""
    plain = [x.item() if hasattr(x, "item") and getattr(x, "ndim", 0) == 0 else x for x in found]
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in plain)
    if not whole and not all(isinstance(x, str) for x in plain):
        wrong = next(
            place for place, x in enumerate(plain) if not isinstance(x, int | str) or isinstance(x, bool)
        )
        raise DataError(
            f"data: the label of {ids[wrong]} is a {type(plain[wrong]).__name__}; "
            "give integers from 0 on, or strings, for all"
        )
    known = names or (tuple(map(str, range(max(plain) + 1))) if whole else tuple(sorted(set(plain))))
    places = {name: place for place, name in enumerate(known)}
    for one, label in zip(ids, plain):
        if (not 0 <= label < len(known)) if whole else label not in places:
            raise DataError(
                f"data: the label {label!r} of {one} is not one of {len(known)} ({', '.join(known[:12])}); "
                "mend it, or name all in data.labels"
            )
    if len(known) < 2:
        raise DataError(
            f"data: holds {len(known)} label, a classifier needs at least 2; name them all in data.labels"
        )
    return known, np.array(plain if whole else [places[x] for x in plain], np.int64)


def _inputs(inputs: Sequence[Any], ids: Sequence[str]) -> tuple[tuple[str, ...], ArrayEncoder | None]:
    if all(isinstance(x, str) for x in inputs):
        return tuple(inputs), None
    items = list[Example]()
    for one, x in zip(ids, inputs):
        if isinstance(x, str):
            raise DataError(f"data: the input of {one} is a text, that of {ids[0]} is not; give one kind")
        array = as_array(x, one)
        if items and array.shape != items[0][INPUT].shape:
            raise DataError(
                f"data: the input of {one} has shape {list(array.shape)}, that of {ids[0]} "
                f"{list(items[0][INPUT].shape)}; give one shape, padded where needed"
            )
        items.append({INPUT: array})
    return tuple(map(str, range(len(items)))), ArrayEncoder(items)


def as_array(value: Any, one: str) -> np.ndarray:
    """int64 or float32. Raises DataError for what is no array of finite numbers; `one` names it there."""
    array = np.asarray(value)
    if array.dtype.kind not in "iufb" or not array.ndim:
        raise DataError(
            f"data: the input of {one} is no text and no array of numbers but {type(value).__name__}; "
            "give a text, or an array of at least one axis"
        )
    if not np.isfinite(array).all():
        raise DataError(
            f"data: the input of {one} holds a number that is not finite; mend it or leave it out"
        )
    return array.astype(np.int64) if array.dtype.kind in "iub" else np.ascontiguousarray(array, np.float32)


def _digest(item: Example) -> str:
    return hashlib.sha256(item[INPUT].tobytes()).hexdigest()[:16]
