"""The obvious twin of fedtune.data.partition: lists of groups, a client at a time.

It fixes what each seed deals.
"""

import hashlib
from itertools import pairwise

import numpy as np

from fedtune.common import seeds


def split(examples, data, seed):
    """(training rows, held-out rows) of each client, as lists."""
    keys = sorted(set(examples.groups)) if examples.groups else list(examples.ids)
    rows = {key: [] for key in keys}
    for row, key in enumerate(examples.groups or examples.ids):
        rows[key].append(row)
    labels = np.array([majority([int(examples.labels[row]) for row in rows[key]]) for key in keys])
    natural = [examples.natural[rows[key][0]] for key in keys] if examples.natural else []
    clients = []
    for part in SCHEMES[data.partition](labels, natural, data, seed):
        kept = held_out(part, keys, data.held_out, seed)
        sides = ([group for group in part if group not in kept], kept)
        clients.append(tuple(sorted(row for group in side for row in rows[keys[group]]) for side in sides))
    return clients


def majority(labels):
    return min(set(labels), key=lambda label: (-labels.count(label), label))


def held_out(part, keys, share, seed):
    count = min(max(1, round(share * len(part))), len(part) - 1)
    return sorted(
        part,
        key=lambda group: (hashlib.sha256(f"{seed}\x1fheld-out\x1f{keys[group]}".encode()).digest(), group),
    )[:count]


def iid(labels, natural, data, seed):
    return as_lists(np.array_split(seeds.generator(seed, "partition").permutation(len(labels)), data.clients))


def dirichlet(labels, natural, data, seed):
    rng, parts = seeds.generator(seed, "partition"), [[] for _ in range(data.clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        for part, piece in zip(
            parts, proportional(members, rng.dirichlet(np.full(data.clients, data.alpha)))
        ):
            part += piece
    return none_empty(parts)


def shards(labels, natural, data, seed):
    rng = seeds.generator(seed, "partition")
    shuffled = rng.permutation(len(labels))
    pieces = as_lists(
        np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], data.clients * data.shards)
    )
    dealt = rng.permutation(len(pieces)).reshape(data.clients, data.shards)
    return [[group for piece in row for group in pieces[piece]] for row in dealt]


def by_value(labels, natural, data, seed):
    values, parts = sorted(set(natural)), []
    each = max(1, data.clients // len(values))
    for value in values:
        rng = seeds.generator(seed, "partition", client=value)
        shuffled = rng.permutation(np.array([group for group, found in enumerate(natural) if found == value]))
        if data.alpha == 0:
            parts += as_lists(np.array_split(shuffled, each))
        else:
            parts += none_empty(proportional(shuffled, rng.dirichlet(np.full(each, data.alpha))))
    return parts


def proportional(groups, shares):
    cuts = [0, *np.round(np.cumsum(shares)[:-1] * len(groups)).astype(int).tolist(), len(groups)]
    return [groups[start:end].tolist() for start, end in pairwise(cuts)]


def none_empty(parts):
    for place in [place for place, part in enumerate(parts) if not part]:
        parts[place].append(max(parts, key=len).pop())  # the first of the largest
    return parts


def as_lists(parts):
    return [part.tolist() for part in parts]


SCHEMES = {"iid": iid, "dirichlet": dirichlet, "shards": shards, "natural": by_value}
