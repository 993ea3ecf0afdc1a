"""Dealing examples out to clients, and each client's into training and held-out.

What is dealt is never a row but a group: the rows that share a value of the job's `group` column, or a single row without
one. So no document stands at two clients or on both sides of a split. The same seed always deals the same way.
"""

import hashlib
import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fedtune import seeds
from fedtune.data.examples import Dataset, Examples
from fedtune.errors import DataError
from fedtune.job import DataSection


@dataclass(frozen=True)
class Split:
    """Who holds what: for each client its name and the places of its rows, int64, ascending.

    Together all `train` and `held_out` places are each row exactly once; no `train` is empty.
    """

    clients: tuple[str, ...]
    train: tuple[np.ndarray, ...]
    held_out: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Groups:
    """m groups: their keys, the group of each row (int64 [n]), and the label most of a group's rows have (int64 [m])."""

    keys: tuple[str, ...]
    of_row: np.ndarray
    labels: np.ndarray


Parts = list[np.ndarray]
"""Groups of each client: int64 places into _Groups.keys."""


def split(examples: Examples, data: DataSection, seed: int) -> Split:
    """Deals the examples out as the job says.

    Args:
        examples: at least one row.
        data: partition, clients, alpha, shards and held-out share are read.

    Raises:
        DataError: fewer rows or groups than clients need, or `clients` does not divide by the natural values.
    """
    groups = _grouped(examples)
    names, parts = _SCHEMES[data.partition](examples, groups, data, seed)
    owner = np.full(len(groups.keys), -1, dtype=np.int64)
    for client, part in enumerate(parts):
        owner[part] = client
    held = np.zeros(len(groups.keys), dtype=bool)
    for part in parts:
        held[_held_out(part, groups.keys, data.held_out, seed)] = True
    return Split(names, _rows(owner, ~held, groups, len(names)), _rows(owner, held, groups, len(names)))


def describe(split: Split, dataset: Dataset) -> list[dict[str, Any]]:
    """One row per client: name, natural value ("" if mixed or none), rows of each side, training rows per label name."""
    return [_describe(*client, dataset) for client in zip(split.clients, split.train, split.held_out)]


def _describe(name: str, train: np.ndarray, held_out: np.ndarray, dataset: Dataset) -> dict[str, Any]:
    natural = {dataset.examples.natural[row] for row in train.tolist()} if dataset.examples.natural else set()
    counts = np.bincount(dataset.examples.labels[train], minlength=len(dataset.label_names))
    return {
        "name": name,
        "natural": natural.pop() if len(natural) == 1 else "",
        "train": len(train),
        "held_out": len(held_out),
        "labels": counts.tolist() if dataset.label_names else [],
    }


def _grouped(examples: Examples) -> _Groups:
    if not examples.groups:
        return _Groups(examples.ids, np.arange(len(examples), dtype=np.int64), examples.labels)
    keys, of_row = np.unique(np.array(examples.groups, dtype=object), return_inverse=True)
    of_row = of_row.astype(np.int64)
    return _Groups(tuple(keys.tolist()), of_row, _majority(of_row, examples.labels))


def _majority(of_row: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The most frequent label of each group, the smallest among equals. int64 [m]."""
    width = int(labels.max()) + 1
    pairs, counts = np.unique(of_row * width + labels, return_counts=True)
    group, label = np.divmod(pairs, width)
    order = np.lexsort((label, -counts, group))
    _, first = np.unique(group[order], return_index=True)
    return label[order][first]


def _rows(owner: np.ndarray, side: np.ndarray, groups: _Groups, clients: int) -> tuple[np.ndarray, ...]:
    """Places of the rows of each client whose group is on this side, ascending."""
    rows = np.flatnonzero(side[groups.of_row])
    holder = owner[groups.of_row[rows]]
    order = np.argsort(holder, kind="stable")
    ends = np.searchsorted(holder[order], np.arange(clients + 1))
    return tuple(rows[order[start:end]].astype(np.int64) for start, end in pairwise(ends))


def _held_out(part: np.ndarray, keys: Sequence[str], share: float, seed: int) -> np.ndarray:
    """The groups of one client that are kept for evaluation: at least one, but never all; none of a single group."""
    count = min(max(1, round(share * len(part))), len(part) - 1)
    ranked = sorted(part.tolist(), key=lambda group: (_rank(seed, keys[group]), group))
    return np.array(ranked[:count], dtype=np.int64)


def _rank(seed: int, key: str) -> bytes:
    """By hash, so that a client's held-out groups do not depend on the order of its rows."""
    return hashlib.sha256(f"{seed}\x1fheld-out\x1f{key}".encode()).digest()


def _iid(examples: Examples, groups: _Groups, data: DataSection, seed: int) -> tuple[tuple[str, ...], Parts]:
    _enough(len(groups.keys), data.clients, 1, examples)
    order = seeds.generator(seed, "partition").permutation(len(groups.keys))
    return _numbered(data.clients), np.array_split(order, data.clients)


def _dirichlet(examples: Examples, groups: _Groups, data: DataSection, seed: int) -> tuple[tuple[str, ...], Parts]:
    """Each label's groups in proportions drawn from Dirichlet(alpha), so that clients differ in labels and in size.

    Source: Hsu et al. 2019, arXiv:1909.06335v1, section 3, with proportions over clients for each label.
    """
    _enough(len(groups.keys), data.clients, 1, examples)
    rng = seeds.generator(seed, "partition")
    parts: Parts = [np.zeros(0, dtype=np.int64)] * data.clients
    for label in np.unique(groups.labels):
        members = rng.permutation(np.flatnonzero(groups.labels == label))
        pieces = _proportional(members, _shares(rng, data.alpha, data.clients))
        parts = [np.concatenate(pair) for pair in zip(parts, pieces)]
    return _numbered(data.clients), _none_empty(parts)


def _shards(examples: Examples, groups: _Groups, data: DataSection, seed: int) -> tuple[tuple[str, ...], Parts]:
    """Groups sorted by label, cut into clients x shards pieces of even size; each client gets `shards` of them by lot.

    Source: McMahan et al. 2017, arXiv:1602.05629v4, section 3.
    """
    _enough(len(groups.keys), data.clients, data.shards, examples)
    rng = seeds.generator(seed, "partition")
    shuffled = rng.permutation(len(groups.keys))
    pieces = np.array_split(shuffled[np.argsort(groups.labels[shuffled], kind="stable")], data.clients * data.shards)
    dealt = rng.permutation(len(pieces)).reshape(data.clients, data.shards)
    return _numbered(data.clients), [np.concatenate([pieces[piece] for piece in row]) for row in dealt]


def _natural(examples: Examples, groups: _Groups, data: DataSection, seed: int) -> tuple[tuple[str, ...], Parts]:
    """Each natural value's groups to clients of its own: one, or clients / values of them."""
    values, of_group = _natural_of_groups(examples, groups, data.by)
    if data.clients % len(values):
        raise DataError(f"data.clients = {data.clients}: {data.by!r} has {_count(len(values), 'value')} ({_few(values)}); "
                        f"give a multiple of {len(values)}, or 0 for one client per value")
    each = max(1, data.clients // len(values))
    members = [np.flatnonzero(of_group == place) for place in range(len(values))]
    smallest = min(range(len(values)), key=lambda place: len(members[place]))
    fewest = len(members[smallest])
    if fewest < each:
        raise DataError(f"data.clients = {data.clients}: {data.by} {values[smallest]!r} has {_count(fewest, _unit(examples))} "
                        f"for its {each} clients; at most {_count(fewest * len(values), 'client')} can be had")
    parts: Parts = []
    for value, held in zip(values, members):
        parts += _deal(held, each, data.alpha, seeds.generator(seed, "partition", client=value))
    return _value_names(values, data.clients and each), parts


def _natural_of_groups(examples: Examples, groups: _Groups, by: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The values, sorted, and the place of each group's. Raises DataError for a group with two values."""
    if not examples.natural:
        raise DataError(f'data.by = {by!r}: these examples have no such column; name another or set data.partition = "iid"')
    values, of_row = np.unique(np.array(examples.natural, dtype=object), return_inverse=True)
    of_group = np.zeros(len(groups.keys), dtype=np.int64)
    of_group[groups.of_row] = of_row
    parted = np.flatnonzero(of_group[groups.of_row] != of_row)
    if len(parted):
        group = groups.of_row[parted[0]]
        raise DataError(f"group {groups.keys[group]!r} has rows of {by} {values[of_row[parted[0]]]!r} and {values[of_group[group]]!r}; "
                        'a group stays with one client: name groups apart or set data.group = ""')
    return tuple(values.tolist()), of_group


def _deal(groups: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> Parts:
    """Even parts for alpha 0, otherwise sizes in Dirichlet(alpha) proportions; none is empty."""
    shuffled = rng.permutation(groups)
    if alpha == 0:
        return np.array_split(shuffled, clients)
    return _none_empty(_proportional(shuffled, _shares(rng, alpha, clients)))


def _shares(rng: np.random.Generator, alpha: float, clients: int) -> np.ndarray:
    return rng.dirichlet(np.full(clients, alpha))


def _proportional(groups: np.ndarray, shares: np.ndarray) -> Parts:
    cuts = np.round(np.cumsum(shares)[:-1] * len(groups)).astype(np.int64)
    return np.split(groups, cuts)


def _none_empty(parts: Parts) -> Parts:
    """Each empty part gets the last group of the part that is largest by then.

    Redrawing until no part is empty may never end for a small alpha; this moves the fewest groups and always ends, as
    there are at least as many groups as parts.
    """
    filled = list(parts)
    largest_first = [(-len(part), place) for place, part in enumerate(filled)]
    heapq.heapify(largest_first)
    for place in [place for place, part in enumerate(filled) if not len(part)]:
        _, largest = largest_first[0]
        filled[place], filled[largest] = filled[largest][-1:], filled[largest][:-1]
        heapq.heapreplace(largest_first, (-len(filled[largest]), largest))
    return filled


def _enough(groups: int, clients: int, each: int, examples: Examples) -> None:
    held = f"the data has {_count(groups, _unit(examples))}"
    if groups < clients:
        raise DataError(f"data.clients = {clients}: each needs one, {held}; at most {_count(groups, 'client')} can be had")
    if groups < clients * each:
        raise DataError(f"data.shards = {each}: {_count(clients, 'client')} with {each} shards each need {clients * each}, {held}; "
                        f"at most {_count(groups // clients, 'shard')} each can be had")


def _unit(examples: Examples) -> str:
    return "group" if examples.groups else "row"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _numbered(clients: int) -> tuple[str, ...]:
    width = max(3, len(str(clients - 1)))
    return tuple(f"client-{client:0{width}d}" for client in range(clients))


def _value_names(values: Sequence[str], each: int) -> tuple[str, ...]:
    """Client names of natural values: the value alone for each = 0, otherwise numbered. Values become safe file names."""
    stems = [re.sub(r"[^\w.-]+", "-", value).strip("-.") or "value" for value in values]
    if len(set(stems)) < len(stems):
        stems = [f"{stem}-{place}" for place, stem in enumerate(stems)]
    width = max(2, len(str(each - 1)))
    return tuple(f"{stem}-{part:0{width}d}" for stem in stems for part in range(each)) if each else tuple(stems)


def _few(values: Sequence[str]) -> str:
    return ", ".join(values[:8]) + (", ..." if len(values) > 8 else "")


_SCHEMES = {"iid": _iid, "dirichlet": _dirichlet, "shards": _shards, "natural": _natural}
