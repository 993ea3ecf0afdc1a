"""Dealing examples out to clients, and each client's into training and held-out.

What is dealt is never a row but a group: the rows that share a value of the job's `group` column, or a
single row without one. So no document stands at two clients or on both sides of a split. The same seed
always deals the same way.

A scheme says for each group at which client it is, by place; nothing here is a list with
an entry for each client.
"""

import hashlib
import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.common import seeds
from fedtune.data.examples import Examples
from fedtune.data.slices import Names, Slices
from fedtune.errors import DataError
from fedtune.job import DataSection


@dataclass(frozen=True)
class Split:
    """Who holds what: for each client its name and the places of its rows, ascending.

    Together all `train` and `held_out` places are each row exactly once; no `train` is empty.
    """

    clients: Names
    train: Slices
    held_out: Slices


@dataclass(frozen=True)
class _Groups:
    """m groups: their keys, the group of each row (int64 [n]), and the label most of a
    group's rows have (int64 [m]).
    """

    keys: Sequence[str]
    of_row: np.ndarray
    labels: np.ndarray


Dealt = tuple[Names, np.ndarray]
"""The clients, and the place of the one who has each group, int64 [m]."""


def split(examples: Examples, data: DataSection, seed: int) -> Split:
    """Deals the examples out as the job says.

    Args:
        examples: at least one row.
        data: partition, clients, alpha, shards and held-out share are read.

    Raises:
        DataError: fewer rows or groups than clients need, or `clients` does not divide by the natural values.
    """
    groups = _grouped(examples)
    names, owner = _SCHEMES[data.partition](examples, groups, data, seed)
    held = _held_out(owner, len(names), groups.keys, data.held_out, seed)
    return Split(names, _rows(owner, ~held, groups, len(names)), _rows(owner, held, groups, len(names)))


def _grouped(examples: Examples) -> _Groups:
    if not examples.groups:
        return _Groups(examples.ids, np.arange(len(examples), dtype=np.int64), examples.labels)
    keys, of_row = _distinct(examples.groups)
    return _Groups(keys, of_row, _majority(of_row, examples.labels))


def _distinct(values: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The different values, sorted, and the place of each one given, int64 [n]."""
    found = tuple(sorted(set(values)))
    places = {value: place for place, value in enumerate(found)}
    return found, np.fromiter((places[value] for value in values), np.int64, len(values))


def _majority(of_row: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The most frequent label of each group, the smallest among equals. int64 [m]."""
    width = int(labels.max()) + 1
    pairs, counts = np.unique(of_row * width + labels, return_counts=True)
    group, label = np.divmod(pairs, width)
    order = np.lexsort((label, -counts, group))
    _, first = np.unique(group[order], return_index=True)
    return label[order][first]


def _rows(owner: np.ndarray, side: np.ndarray, groups: _Groups, clients: int) -> Slices:
    """Places of the rows of each client whose group is on this side, ascending."""
    rows = np.flatnonzero(side[groups.of_row])
    return Slices.by_owner(rows, owner[groups.of_row[rows]], clients)


def _held_out(owner: np.ndarray, clients: int, keys: Sequence[str], share: float, seed: int) -> np.ndarray:
    """Which groups are kept for evaluation, bool [m]: of each client at least one,
    but never all; none of a single group.
    """
    sizes = np.bincount(owner, minlength=clients)
    kept = np.minimum(np.maximum(1, np.rint(share * sizes)), sizes - 1)
    order = np.lexsort((*_ranks(seed, keys).T[::-1], owner))  # by client, then by rank, then by group
    # among the groups of its client
    place = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held = np.zeros(len(owner), dtype=bool)
    held[order] = place < np.repeat(kept, sizes)
    return held


def _ranks(seed: int, keys: Iterable[str]) -> np.ndarray:
    """By hash, so that a client's held-out groups do not depend on the order of its rows. uint64 [m,
    4], the first counts most.
    """
    digests = bytearray()
    for key in keys:
        digests += hashlib.sha256(f"{seed}\x1fheld-out\x1f{key}".encode()).digest()
    return np.frombuffer(digests, ">u8").reshape(-1, 4).astype(np.uint64)


def _iid(examples: Examples, groups: _Groups, data: DataSection, seed: int) -> Dealt:
    _enough(len(groups.keys), data.clients, 1, examples)
    order = seeds.generator(seed, "partition").permutation(len(groups.keys))
    return _numbered(data.clients), _given(order, _even(len(order), data.clients))


def _dirichlet(examples: Examples, groups: _Groups, data: DataSection, seed: int) -> Dealt:
    """Each label's groups in proportions drawn from Dirichlet(alpha),
    so that clients differ in labels and in size.

    Source: Hsu et al. 2019, arXiv:1909.06335v1, section 3, with proportions over clients for each label.
    """
    _enough(len(groups.keys), data.clients, 1, examples)
    rng = seeds.generator(seed, "partition")
    order, holder = [], []
    for label in np.unique(groups.labels):
        members = rng.permutation(np.flatnonzero(groups.labels == label))
        order.append(members)
        holder.append(_proportional(len(members), _shares(rng, data.alpha, data.clients)))
    return _numbered(data.clients), _given(
        np.concatenate(order), _none_empty(np.concatenate(holder), data.clients)
    )


def _shards(examples: Examples, groups: _Groups, data: DataSection, seed: int) -> Dealt:
    """Groups sorted by label, cut into clients x shards pieces of even size;
    each client gets `shards` of them by lot.

    Source: McMahan et al. 2017, arXiv:1602.05629v4, section 3.
    """
    _enough(len(groups.keys), data.clients, data.shards, examples)
    rng = seeds.generator(seed, "partition")
    shuffled = rng.permutation(len(groups.keys))
    pieces = data.clients * data.shards
    holder = np.empty(pieces, dtype=np.int64)
    holder[rng.permutation(pieces)] = np.repeat(np.arange(data.clients), data.shards)
    by_label = shuffled[np.argsort(groups.labels[shuffled], kind="stable")]
    return _numbered(data.clients), _given(by_label, holder[_even(len(by_label), pieces)])


def _natural(examples: Examples, groups: _Groups, data: DataSection, seed: int) -> Dealt:
    """Each natural value's groups to clients of its own: one, or clients / values of them."""
    values, of_group = _natural_of_groups(examples, groups, data.by)
    if data.clients % len(values):
        raise DataError(
            f"data.clients = {data.clients}: {data.by!r} has {_count(len(values), 'value')} "
            f"({_few(values)}); give a multiple of {len(values)}, or 0 for one client per value"
        )
    each = max(1, data.clients // len(values))
    members = Slices.by_owner(np.arange(len(of_group)), of_group, len(values))
    smallest = int(np.argmin(members.sizes))
    fewest = len(members[smallest])
    if fewest < each:
        raise DataError(
            f"data.clients = {data.clients}: {data.by} {values[smallest]!r} "
            f"has {_count(fewest, _unit(examples))} for its {each} clients; "
            f"at most {_count(fewest * len(values), 'client')} can be had"
        )
    names = _value_names(values, data.clients and each)
    if each == 1:
        return names, of_group
    owner = np.empty_like(of_group)
    for place, value in enumerate(values):
        shuffled, holder = _deal(
            members[place], each, data.alpha, seeds.generator(seed, "partition", client=value)
        )
        owner[shuffled] = place * each + holder
    return names, owner


def _natural_of_groups(examples: Examples, groups: _Groups, by: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The values, sorted, and the place of each group's. Raises DataError for a group with two values."""
    if not examples.natural:
        raise DataError(
            f"data.by = {by!r}: these examples have no such column; "
            'name another or set data.partition = "iid"'
        )
    values, of_row = _distinct(examples.natural)
    of_group = np.zeros(len(groups.keys), dtype=np.int64)
    of_group[groups.of_row] = of_row
    parted = np.flatnonzero(of_group[groups.of_row] != of_row)
    if len(parted):
        group = groups.of_row[parted[0]]
        raise DataError(
            f"group {groups.keys[group]!r} has rows of {by} {values[of_row[parted[0]]]!r} and "
            f"{values[of_group[group]]!r}; "
            'a group stays with one client: name groups apart or set data.group = ""'
        )
    return values, of_group


def _deal(
    groups: np.ndarray, clients: int, alpha: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The groups shuffled, and which of the clients has each: even numbers for alpha 0, otherwise sizes in
    Dirichlet(alpha) proportions; none is empty.
    """
    shuffled = rng.permutation(groups)
    if alpha == 0:
        return shuffled, _even(len(shuffled), clients)
    return shuffled, _none_empty(_proportional(len(shuffled), _shares(rng, alpha, clients)), clients)


def _given(order: np.ndarray, holder: np.ndarray) -> np.ndarray:
    """The holder of group 0, 1…, from that of the groups in the order they were dealt. Both int64 [m]."""
    owner = np.empty_like(holder)
    owner[order] = holder
    return owner


def _even(count: int, parts: int) -> np.ndarray:
    """The part of each of `count` things in a row, int64 [count]: sizes differ by at most one,
    the larger parts first.
    """
    each, more = divmod(count, parts)
    return np.repeat(np.arange(parts), each + (np.arange(parts) < more))


def _shares(rng: np.random.Generator, alpha: float, clients: int) -> np.ndarray:
    return rng.dirichlet(np.full(clients, alpha))


def _proportional(count: int, shares: np.ndarray) -> np.ndarray:
    """As `_even`, with part sizes in proportion to `shares`."""
    cuts = np.round(np.cumsum(shares)[:-1] * count).astype(np.int64)
    return np.repeat(np.arange(len(shares)), np.diff(cuts, prepend=0, append=count))


def _none_empty(holder: np.ndarray, parts: int) -> np.ndarray:
    """`holder` [m], with the last thing of the part that is largest by then given to each empty part in turn.

    Redrawing until no part is empty may never end for a small alpha; this moves the fewest groups and always
    ends, as there are at least as many groups as parts.
    """
    sizes = np.bincount(holder, minlength=parts)
    empty = np.flatnonzero(sizes == 0).tolist()
    if not empty:
        return holder
    order, ends, filled = np.argsort(holder, kind="stable"), np.cumsum(sizes).tolist(), holder.copy()
    largest_first = list(zip((-sizes).tolist(), range(parts)))
    heapq.heapify(largest_first)
    for place in empty:
        size, largest = largest_first[0]
        ends[largest] -= 1
        filled[order[ends[largest]]] = place
        heapq.heapreplace(largest_first, (size + 1, largest))
    return filled


def _enough(groups: int, clients: int, each: int, examples: Examples) -> None:
    held = f"the data has {_count(groups, _unit(examples))}"
    if groups < clients:
        raise DataError(
            f"data.clients = {clients}: each needs one, {held}; at most {_count(groups, 'client')} can be had"
        )
    if groups < clients * each:
        raise DataError(
            f"data.shards = {each}: {_count(clients, 'client')} with {each} shards each need "
            f"{clients * each}, {held}; at most {_count(groups // clients, 'shard')} each can be had"
        )


def _unit(examples: Examples) -> str:
    return "group" if examples.groups else "row"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _numbered(clients: int) -> Names:
    return Names(("client",), clients, 3)


def _value_names(values: Sequence[str], each: int) -> Names:
    """Client names of natural values: the value alone for each = 0, otherwise numbered.

    Values become safe file names.
    """
    stems = [re.sub(r"[^\w.-]+", "-", value).strip("-.") or "value" for value in values]
    if len(set(stems)) < len(stems):
        stems = [f"{stem}-{place}" for place, stem in enumerate(stems)]
    return Names(tuple(stems), each)


def _few(values: Sequence[str]) -> str:
    return ", ".join(values[:8]) + (", ..." if len(values) > 8 else "")


_SCHEMES = {"iid": _iid, "dirichlet": _dirichlet, "shards": _shards, "natural": _natural}
