"""FedSelect (Tamirisa et al. 2024, arXiv:2404.02478): each client finds which entries of the weights it keeps
for itself; every other entry is averaged.

    client k: w = own values where m_k is 1, w^t elsewhere;
              local steps that move entries with m_k = 1 alone, then local steps that move the others alone
    server:   each entry of w^{t+1} is the mean over the clients that hold it global, m_k = 0;
              one that nobody holds stays as it is
    then, every few rounds that k takes part in: in each weight, the share of still global entries that moved
              most since the last time become personal

As in the authors' code, biases are never personal, the entries that become personal are still averaged in
that round, and how far an entry moved is |w - w at the last time|, from the model of the client's first round
on. What differs: a round is one run of steps for the personal entries and one for the others, each with a
fresh optimizer, where the code alternates them epoch by epoch; entries become personal with the value that
the client trained, where the code, in which everybody takes part in every round, goes on from the mean; a
client never keeps more of a tensor than `most` of it, where the code may overshoot. On Fed-SB an entry of a
core means the same to all, as the frame is common.

No mask is sent. An entry that a client keeps is sent as the model had it, one that it holds global never
is: where training left it as it was, it is sent one float32 further. So messages are those of federated
averaging, and the coordinator can see which entries a client keeps, and of their values only those that
they become personal with.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from fedtune.aggregation.mean import Mean, require_same, streamed
from fedtune.stateful.base import Answer, Client, Method, Pull, Trained, Training
from fedtune.types import Arrays, TensorSpec, Update
from fedtune.wire import Schema

MASK, MARK = "mask.", "mark."
"""Begin the names of what a client keeps beside the values of a tensor: 1 where it is personal, else 0;
and its values when entries last became personal.
"""
ROUNDS = "rounds"
"""How many rounds the client has taken part in, [1]."""
TINY = 1e-9
"""0.29 of 100 entries are 29, whatever floats make of the product."""


def is_masked(name: str) -> bool:
    """Whether entries of this tensor may become personal."""
    return name.rpartition(".")[2] != "bias"


def kept(schema: Schema) -> Schema:
    """What a client keeps, of the trained tensors in `schema`."""
    masked = [t for t in schema.tensors if is_masked(t.name)]
    return Schema(
        (
            *(TensorSpec(prefix + t.name, t.shape, t.unit) for prefix in ("", MASK, MARK) for t in masked),
            TensorSpec(ROUNDS, (1,), ROUNDS),
        )
    )


def trainings(client: Client, proximal: float = 0.0) -> tuple[Training, ...]:
    """Of the personal entries, where there are any, then of the others. proximal:
    mu of FedProx, for the others alone.
    """
    mask = _mask(client.model, client.kept)
    others = Pull(proximal, moving={name: 1 - m for name, m in mask.items()})
    if not any(m.any() for m in mask.values()):
        return (Training(client.model, others),)
    return Training(personal(client.model, client.kept), Pull(moving=mask), "personal"), Training({}, others)


def answer(client: Client, given: Sequence[Trained], share: float, most: float, every: int) -> Answer:
    """share: of the still global entries of a tensor that become personal, rounded up, every `every`
    rounds. most: of a tensor's entries that ever do.
    """
    trained, metrics = given[-1]
    mask, masked = _mask(client.model, client.kept), [name for name in client.model if is_masked(name)]
    mark = client.model if client.kept is None else {name: client.kept[MARK + name] for name in masked}
    update = {name: sent(w, trained[name], mask[name]) for name, w in client.model.items()}
    rounds = 1 if client.kept is None else int(client.kept[ROUNDS][0]) + 1
    if rounds % every == 0:
        mask = {
            name: promoted(mask[name], np.abs(trained[name] - mark[name]), share, most) for name in masked
        }
        mark = trained
    stays = {
        prefix + name: found[name]
        for prefix, found in (("", trained), (MASK, mask), (MARK, mark))
        for name in masked
    }
    return Answer(update, metrics, stays | {ROUNDS: np.array([rounds], np.float32)})


def personal(model: Arrays, kept: Arrays | None) -> Arrays:
    """What the client predicts with, and begins a round from."""
    return (
        model
        if kept is None
        else {
            name: np.where(kept[MASK + name] > 0, kept[name], w) if is_masked(name) else w
            for name, w in model.items()
        }
    )


def promoted(mask: np.ndarray, moved: np.ndarray, share: float, most: float) -> np.ndarray:
    """The mask of a tensor with more of it personal: of equal ones the first. moved: how far each entry
    did, of the mask's shape.
    """
    left = np.flatnonzero(mask == 0)
    wanted, room = (
        np.ceil(share * left.size - TINY),
        np.floor(most * mask.size + TINY) - (mask.size - left.size),
    )
    after = mask.copy()
    after.flat[left[np.argsort(-moved.flat[left], kind="stable")[: max(0, int(min(wanted, room)))]]] = 1
    return after


def sent(start: np.ndarray, trained: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What travels of a tensor: equal to `start` where the mask is 1, and nowhere else."""
    least = np.finfo(np.float32).tiny  # smaller numbers may count as 0 somewhere on the way
    further = np.where(np.abs(start) < least, least, np.nextafter(start, np.float32(np.inf)))
    return np.where(mask > 0, start, np.where(trained == start, further, trained)).astype(np.float32)


def held_mean(updates: Iterable[Update], reference: Arrays, equal: bool = False) -> Mean:
    """Mean of each entry over the updates that hold it, which is where they differ from `reference`; an entry
    that none of any weight holds stays.

    Reads `updates` once and keeps two running sums, in float64. Arguments and errors are those of
    `aggregation.mean.weighted_mean`.
    """
    return streamed(updates, lambda first: _Held(reference), equal)


class _Held:
    """sum(w * (u - reference)) and sum(w) of each entry over the updates that hold it."""

    def __init__(self, reference: Arrays) -> None:
        self.reference = reference
        self.sums, self.weights = (
            {name: np.zeros(a.shape) for name, a in reference.items()} for _ in range(2)
        )

    def add(self, weight: float, update: Update) -> None:
        require_same(update, self.reference)
        for name, a in update.arrays.items():
            self.sums[name] += weight * (a.astype(np.float64) - self.reference[name])
            self.weights[name] += weight * (a != self.reference[name])

    def means(self) -> Arrays:
        return {
            name: (a + self.sums[name] / np.where(self.weights[name] > 0, self.weights[name], 1.0)).astype(
                a.dtype
            )
            for name, a in self.reference.items()
        }


def _mask(model: Arrays, kept: Arrays | None) -> Arrays:
    """m_k of each trained tensor, 0 before the client's first round."""
    return {
        name: kept[MASK + name] if kept is not None and is_masked(name) else np.zeros_like(w)
        for name, w in model.items()
    }


FED_SELECT = Method(
    "select",
    lambda job, client: trainings(client, job.federation.proximal),
    lambda job, schema, client, trained: answer(
        client, trained, job.personal.share, job.personal.most, job.personal.every
    ),
    keeps=kept,
    personal=personal,
    gradients=2,
    copies=7,
)
