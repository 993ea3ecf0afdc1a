"""What a client says before a round of how much each block matters for its data,
from gradients of a few of its batches.

    gradient   mean over batches of |g|^2 of the block
               (arXiv:2408.15600, section 4)
    rgn        the same over |w|^2 of the base's own weights of the block
               (arXiv:2210.11466, section 4, in squares)
    snr        mean over the block's numbers of mean(g)^2 / (var(g) + 1e-8), over batches
               (arXiv:2210.11466, section 4)
    fisher     sum over the block's tensors of |F|, F the mean over examples of g^2
               (arXiv:2310.17041, section 3)

g is the gradient of a batch's mean loss to the tensors that the job trains, with the model as the
round begins. A question is a whole model, so that nobody needs to have taken part before; the
answer is a number per block.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedtune.errors import Refused
from fedtune.job import Job, UnitsSection
from fedtune.types import Arrays, TensorSpec
from fedtune.wire import Header, Schema, held_places, packed_size

_FLOOR = 1e-8
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
    say nothing: without any, and for snr with one.

    weights: |w|^2 of each block, for rgn; raises Refused where one is missing.
    """
    if strategy == "rgn" and any(weights.get(unit, 0.0) <= 0 for unit in schema.blocks):
        raise Refused(
            "bundle",
            'does not say how large the base\'s blocks are, which units.strategy = "rgn" '
            "divides by; make the bundle anew",
        )
    sums, count = dict[str, np.ndarray](), 0
    names = [t.name for t in schema.of_units(schema.blocks)]
    for found in gradients:
        count += 1
        for name in names:
            part = _part(strategy, found[name])
            sums[name] = sums[name] + part if name in sums else part
    if count < (2 if strategy == "snr" else 1):
        return {SCORES: np.zeros(len(schema.blocks), np.float32)}
    scores = [
        _score(strategy, [sums[t.name] / count for t in schema.of_units([unit])]) for unit in schema.blocks
    ]
    return {
        SCORES: np.array(
            [s / weights[unit] if strategy == "rgn" else s for s, unit in zip(scores, schema.blocks)],
            np.float32,
        )
    }


def _part(strategy: str, g: np.ndarray) -> np.ndarray:
    """What is added up of a tensor's gradients."""
    if strategy in ("gradient", "rgn"):
        return np.array(np.vdot(g, g), np.float64)
    return np.square(g) if strategy == "fisher" else np.stack([g, np.square(g)], dtype=np.float64)


def kept_numbers(strategy: str) -> int:
    """Float32 numbers, or as many bytes, that a probe keeps for each trained number beside the gradient."""
    return {"fisher": 1, "snr": 4}.get(strategy, 0)


def _score(strategy: str, means: Sequence[np.ndarray]) -> float:
    """Of a block, from the means over gradients of what `_part` has, by tensor."""
    if strategy == "fisher":
        return float(sum(np.linalg.norm(squares) for squares in means))
    if strategy != "snr":
        return float(sum(means))
    ratios = [np.ravel(mean**2 / (np.maximum(square - mean**2, 0.0) + _FLOOR)) for mean, square in means]
    return float(np.concatenate(ratios).mean())


def probe_bytes(schema: Schema, rank: int = 0) -> tuple[int, int]:
    """Bytes of a question to a client of this rank (0: of the whole model) and of its answer."""
    question = Header(
        kind="probe", schema_digest=schema.digest, frame="0" * 16, round=1, tensors=held_places(schema, rank)
    )
    of = answers(schema)
    return packed_size(question, schema), packed_size(
        Header(kind="block-scores", schema_digest=of.digest, frame="0" * 16, round=1), of
    )
