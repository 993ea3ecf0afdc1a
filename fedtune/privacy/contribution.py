"""What one client adds to a round's secure sum, and what the sum says:
the same on a device and in a simulation.

A client's vector is its difference from the model, clipped; behind it, where nothing is protected, its mean
training loss and accuracy; and for each unit whether it is there (where clients are protected, 1 for all).
All in whole numbers modulo 2^k (`secagg.vectors`).
"""

from dataclasses import dataclass

import numpy as np

from fedtune.common.trees import check_same
from fedtune.errors import PrivacyRefused
from fedtune.job import Job
from fedtune.privacy.clipping import clip as clipped
from fedtune.privacy.distributed import Distributed, distributed
from fedtune.privacy.noise import Noise
from fedtune.privacy.plan import bounded_scores, fewest, noise_multiplier, scored
from fedtune.secagg.graph import Design, design
from fedtune.secagg.quantise import Grid, headroom, quantise
from fedtune.secagg.terms import Terms
from fedtune.secagg.vectors import counted, flat, length, means, unpack
from fedtune.types import Arrays, Metrics, TensorSpec
from fedtune.wire import Schema

SCORES = "(training metrics)"
"""Tensor and unit of the two numbers beside the model: mean loss over METRIC_CAP,
and accuracy, in units of clip.
"""


@dataclass(frozen=True)
class Secure:
    """What coordinator and clients of a securely summed run hold alike.

    Attributes:
        schema: of the model, and SCORES where training metrics are summed, too.
        cohort: clients asked in a round, at most; the denominator where clients are protected.
        clip: L2 bound of a client's difference from the model.
        noise: each client's share; None where the sum has no noise of its own.
    """

    schema: Schema
    cohort: int
    design: Design
    grid: Grid
    clip: float
    noise: Distributed | None = None

    @property
    def scores(self) -> bool:
        return SCORES in self.schema.units

    def terms(self, session: bytes, round: int) -> Terms:
        return Terms(session, round, length(self.schema), self.grid.bits)

    def vector(self, update: Arrays, metrics: Metrics, model: Arrays, source: Noise) -> np.ndarray:
        """[length], one client's: `update` holds new values of the tensors it trained, of whole units.

        Raises Refused for numbers that are not finite, ShapeMismatch for tensors that are not of the schema,
        PrivacyRefused as `Distributed.shares`.
        """
        check_same(update, {name: model[name] for name in update.keys() & model.keys()})
        part, _ = clipped({name: a.astype(np.float64) - model[name] for name, a in update.items()}, self.clip)
        if self.scores and metrics.get("loss", (0.0, 0.0))[1] > 0:
            part[SCORES] = self.clip * bounded_scores(metrics)
        units = tuple(dict.fromkeys(t.unit for t in self.schema.tensors if t.name in part))
        numbers = flat(part, self.schema, units)
        if self.noise is None:
            return counted(quantise(numbers, self.grid, source.uniform), self.schema, units)
        # the sum is divided by `cohort` alone, so that nobody needs to know by how many a unit was trained:
        # no noise would be on that
        return counted(
            self.noise.shares(numbers * self.grid.scale, source).astype(self.grid.dtype),
            self.schema,
            self.schema.units,
        )

    def change(self, total: np.ndarray, clients: int) -> tuple[Arrays, Metrics]:
        """(what is added to the model, training metrics), from the sum of so many vectors, [length].

        By unit the mean over those who trained it; where clients are protected the sum
        over `cohort`, whoever came.

        Raises Refused("range") for a sum that such vectors cannot have.
        """
        found = unpack(total, self.schema, self.grid, clients)
        if self.noise is not None:
            return {name: a / self.cohort for name, a in found.sums.items()}, {}
        mean = means(found, self.schema, {t.name: np.zeros(t.shape) for t in self.schema.tensors})
        scores, count = mean.pop(SCORES, np.zeros(2)) / self.clip, float(found.counts.get(SCORES, 0))
        if not count:
            return mean, {}
        loss, right = np.clip(scores, 0.0, 1.0).tolist()
        return mean, scored(loss, right, count)


def secure_of(job: Job, schema: Schema) -> Secure | None:
    """None where the job sums in the clear.

    Raises PrivacyRefused for settings that no modulus holds, or noise that was not computed.
    """
    privacy, cohort = job.privacy, job.federation.cohort
    if not privacy.secure_aggregation:
        return None
    try:
        shape, bound = design(cohort), privacy.update_clip or privacy.clip
        if privacy.unit != "client":
            both = (*schema.tensors, TensorSpec(SCORES, (2,), SCORES))
            return Secure(
                Schema(both) if privacy.unit == "none" else schema,
                cohort,
                shape,
                headroom(bound, cohort),
                bound,
            )
        grid, noise = distributed(bound, noise_multiplier(job), schema.size, cohort, fewest(job))
        return Secure(schema, cohort, shape, grid, bound, noise)
    except ValueError as e:
        raise PrivacyRefused(f"privacy.secure-aggregation = true: {e}") from None


def message_bytes(secure: Secure, clients: int) -> tuple[int, int]:
    """(up, down): bytes of the messages that one of `clients` sends and gets for a round's sum beside the
    model packet, if all stay.

    The model packet stands for the first question. Lengths as in `secagg.messages`.
    """
    neighbours = min(secure.design.degree, clients - 1)
    return 249 + 119 * neighbours + length(secure.schema) * secure.grid.bits // 8, 103 + 152 * neighbours
