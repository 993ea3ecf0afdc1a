"""What a client says before a round of how much each block matters for its data, from gradients of a few of
its batches (`fedtune.units.scores`).

A question is a whole model, so that nobody needs to have taken part before; the
answer is a number per block.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from fedtune.errors import Refused
from fedtune.job import Job, UnitsSection
from fedtune.types import Arrays, TensorSpec
from fedtune.units.scores import Score
from fedtune.units.strategies import STRATEGIES
from fedtune.wire import Header, Schema, held_places, packed_size

SCORES = "scores"


def require_probing(job: Job) -> UnitsSection:
    """How the job probes.

    Raises Refused for one that does not: then scores of a client's data are nobody's business.
    """
    if not job.units.probes:
        raise Refused("kind", f'a probe is asked for, and units.strategy = "{job.units.strategy}" needs none')
    return job.units


def answers(schema: Schema) -> Schema:
    """What an answer holds: one tensor, a score per block from the bottom up."""
    return Schema((TensorSpec(SCORES, (len(schema.blocks),), SCORES),))


def block_scores(
    strategy: str, schema: Schema, gradients: Iterable[Arrays], weights: Mapping[str, float]
) -> Arrays:
    """The answer of a client from its gradients, which are read once and not kept; 0 everywhere where they
    say nothing: without any, and with fewer than the score needs.

    weights: |w|^2 of each block, for scores relative to it; raises Refused where one is missing.
    """
    how = _score_of(strategy)
    if how.relative and any(weights.get(unit, 0.0) <= 0 for unit in schema.blocks):
        raise Refused(
            "bundle",
            f'does not say how large the base\'s blocks are, which units.strategy = "{strategy}" '
            "divides by; make the bundle anew",
        )
    sums, count = dict[str, np.ndarray](), 0
    names = [t.name for t in schema.of_units(schema.blocks)]
    for found in gradients:
        count += 1
        for name in names:
            part = how.part(found[name])
            sums[name] = sums[name] + part if name in sums else part
    if count < how.fewest:
        return {SCORES: np.zeros(len(schema.blocks), np.float32)}
    scores = [how.score([sums[t.name] / count for t in schema.of_units([unit])]) for unit in schema.blocks]
    over = [weights[unit] if how.relative else 1.0 for unit in schema.blocks]
    return {SCORES: np.array([score / by for score, by in zip(scores, over)], np.float32)}


def _score_of(strategy: str) -> Score:
    score = STRATEGIES[strategy].score
    assert score is not None, "asked for scores by a strategy that goes by none"
    return score


def probe_bytes(schema: Schema, rank: int = 0) -> tuple[int, int]:
    """Bytes of a question to a client of this rank (0: of the whole model) and of its answer."""
    question = Header(
        kind="probe", schema_digest=schema.digest, frame="0" * 16, round=1, tensors=held_places(schema, rank)
    )
    of = answers(schema)
    return packed_size(question, schema), packed_size(
        Header(kind="block-scores", schema_digest=of.digest, frame="0" * 16, round=1), of
    )
