"""FedLoGe (Xiao et al. 2024, arXiv:2401.08977), for labels with a long tail: what is below the head learns
against a fixed one, and two heads learn on its features.

    client k: w <- steps from w^t under the fixed head E, which does not move
              g <- steps from g^t, then h_k <- steps from h_k, each on the features that w gives,
              which do not move
              sends w and g, keeps h_k
    server:   w^{t+1}, g^{t+1} = means
    the shared model predicts with   1.7 g_c / |g_c|     for each class c (its bias as it is)
    client k with                    g_c |h_kc| + h_kc   and the sum of the biases, ABSENT for a class that it
                                                         has no example of

E is a sparse equiangular tight frame: rows of length 1, all at the angle of cosine -1 / (C - 1)
for C classes, SPARSITY of the numbers 0. It follows from the seed and the shape of the head alone,
so that it never travels.

1.7, the product and the sum are in the authors' code (realignment, `localtest`), which has the product as one
of several ways to join the heads. What differs: there the heads learn in each step on features that still
move, here on those that the client ends its training with, from the same batches; there the zeros of E are
drawn alone and Adam finds nearly equal angles, here zeros and angles are exact wherever the head has many
more features than classes; there h_k begins at random, here at the client's first g; there a class is absent
that the client's test examples lack, which nobody can know beforehand, here one that its training examples
lack, and there it has weights of -1e10, which for features of either sign is no small number. Realigned are
the predictions alone: training goes on from g.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fedtune.common.seeds import generator
from fedtune.stateful.base import Answer, Client, Method, Pull, Trained, Training
from fedtune.stateful.fed_per import own
from fedtune.types import Arrays, TensorSpec
from fedtune.wire import Schema

WEIGHT, BIAS = "head.weight", "head.bias"
PRESENT = "present"
"""What a client keeps beside its head: 1 for each class that it has examples of, else 0; [classes]."""
LENGTH, SPARSITY, ABSENT = 1.7, 0.6, -100.0
STEPS = 300
"""Of gradient descent to equal angles: ten classes are there to rounding after a third of
them, a hundred after all.
"""


def kept(schema: Schema) -> Schema:
    """What a client keeps, of the trained tensors in `schema`."""
    head = own(schema)
    classes = next(t.shape[0] for t in head.tensors if t.name == WEIGHT)
    return Schema((*head.tensors, TensorSpec(PRESENT, (classes,), PRESENT)))


def trainings(client: Client, seed: int, proximal: float = 0.0) -> tuple[Training, ...]:
    """Of what is below the head, of the shared head, and of the client's own. proximal:
    mu of FedProx, for what is shared.
    """
    shared = _head(client.model)
    fixed = {name: np.zeros_like(a) for name, a in shared.items()} | {
        WEIGHT: frame(*client.model[WEIGHT].shape, seed).copy()
    }
    head = {name: np.full_like(a, name in shared) for name, a in client.model.items()}
    below = {name: 1 - a for name, a in head.items()}
    return (
        Training(client.model | fixed, Pull(proximal, moving=below)),
        Training(shared, Pull(proximal, moving=head)),
        Training(_head(client.kept or shared), Pull(moving=head)),
    )


def answer(client: Client, given: Sequence[Trained]) -> Answer:
    _, (update, metrics), (ended, _) = given
    present = np.isin(np.arange(len(client.model[WEIGHT])), client.labels)
    return Answer(update, metrics, _head(ended) | {PRESENT: present.astype(np.float32)})


def realigned(model: Arrays) -> Arrays:
    """What the shared model predicts with: every class as long as any,
    as training makes those with many examples longer.
    """
    length = np.linalg.norm(model[WEIGHT], axis=1, keepdims=True)
    return model | {
        WEIGHT: np.where(length > 0, model[WEIGHT] * LENGTH / np.where(length > 0, length, 1), 0).astype(
            np.float32
        )
    }


def personal(model: Arrays, kept: Arrays) -> Arrays:
    """What the client predicts with. model: as it was trained, not realigned."""
    length = np.linalg.norm(kept[WEIGHT], axis=1, keepdims=True)
    bias = model[BIAS] + kept[BIAS] + np.where(kept[PRESENT] > 0, 0, ABSENT)
    return model | {
        WEIGHT: (model[WEIGHT] * length + kept[WEIGHT]).astype(np.float32),
        BIAS: bias.astype(np.float32),
    }


@lru_cache(maxsize=4)
def frame(classes: int, features: int, seed: int) -> np.ndarray:
    """E, float32 [classes, features], the same on every machine up to rounding.

    Each feature that is used at all is used by so many classes, drawn by the seed, that the zeros are
    SPARSITY of the whole. From random numbers there, gradient descent on |E E' - G|^2, with G the cosines of
    the frame, on matrices whose rows add up to 0, as those of such a frame do.
    """
    rng, share = generator(seed, "etf"), 1 - SPARSITY
    users = min(classes, max(2, round(share * classes)))
    used = rng.permutation(features)[: max(1, round(share * classes * features / users))]
    mask = np.zeros((classes, features))
    for feature in used.tolist():
        mask[rng.permutation(classes)[:users], feature] = 1
    e = mask * rng.standard_normal((classes, features))
    e /= np.maximum(np.linalg.norm(e, axis=1, keepdims=True), np.finfo(float).tiny)
    goal = (classes * np.eye(classes) - 1) / max(1, classes - 1)
    for _ in range(STEPS):
        e = _balanced(e, mask)
        e -= 0.25 * mask * ((e @ e.T - goal) @ e)
    e = _balanced(e, mask)
    found = (e / np.maximum(np.linalg.norm(e, axis=1, keepdims=True), np.finfo(float).tiny)).astype(
        np.float32
    )
    found.setflags(write=False)
    return found


def _balanced(e: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The nearest matrix with these zeros whose rows add up to 0."""
    return e - mask * (e.sum(0) / np.maximum(mask.sum(0), 1))


def _head(arrays: Arrays) -> Arrays:
    return {name: a for name, a in arrays.items() if name.startswith("head.")}


FED_LOGE = Method(
    "loge",
    lambda job, client: trainings(client, job.federation.seed, job.federation.proximal),
    lambda job, schema, client, trained: answer(client, trained),
    keeps=kept,
    personal=personal,
    shared=realigned,
    gradients=3,
    copies=4,
)
