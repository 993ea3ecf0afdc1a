"""What a client says before a round of how much each block matters for its data, from gradients of a few of its batches.

    gradient   mean over batches of |g|^2 of the block                                     arXiv:2408.15600, section 4
    rgn        the same over |w|^2 of the base's own weights of the block                  arXiv:2210.11466, section 4, in squares
    snr        mean over the block's numbers of mean(g)^2 / (var(g) + 1e-8), over batches   arXiv:2210.11466, section 4
    fisher     sum over the block's tensors of |F|, F the mean over examples of g^2         arXiv:2310.17041, section 3

g is the gradient of a batch's mean loss to the tensors that the job trains, with the model as the round begins. A question is a whole
model, so that nobody needs to have taken part before; the answer is a number per block.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from fedtune.errors import Refused
from fedtune.job import Job, UnitsSection
from fedtune.types import Arrays, TensorSpec
from fedtune.wire import Header, Schema, packed_size

_FLOOR = 1e-8
SCORES = "scores"


def require_probing(job: Job) -> UnitsSection:
    """How the job probes. Raises Refused for one that does not: then scores of a client's data are nobody's business."""
    if not job.units.probes:
        raise Refused("kind", f"a probe is asked for, and units.strategy = \"{job.units.strategy}\" needs none")
    return job.units


def answers(schema: Schema) -> Schema:
    """What an answer holds: one tensor, a score per block from the bottom up."""
    return Schema((TensorSpec(SCORES, (len(schema.blocks),), SCORES),))


def block_scores(strategy: str, schema: Schema, gradients: Iterable[Arrays], weights: Mapping[str, float]) -> Arrays:
    """The answer of a client from its gradients, which are read once and not kept; 0 everywhere without any. weights: |w|^2 of each block, for rgn."""
    squares, totals, count = dict[str, np.ndarray](), dict[str, np.ndarray](), 0
    names = [t.name for t in schema.of_units(schema.blocks)]
    for found in gradients:
        count += 1
        for name in names:
            g = found[name].astype(np.float64)
            squares[name] = squares.get(name, 0.0) + g * g
            totals[name] = totals.get(name, 0.0) + g
    scores = np.array([_score(strategy, schema, unit, squares, totals, count) if count else 0.0 for unit in schema.blocks])
    if strategy == "rgn":
        scores /= np.array([weights.get(unit) or np.inf for unit in schema.blocks])
    return {SCORES: scores.astype(np.float32)}


def _score(strategy: str, schema: Schema, unit: str, squares: Arrays, totals: Arrays, count: int) -> float:
    names = [t.name for t in schema.of_units([unit])]
    if strategy == "fisher":
        return float(sum(np.linalg.norm(squares[name] / count) for name in names))
    if strategy != "snr":
        return float(sum(squares[name].sum() for name in names) / count)
    signal = [np.square(totals[name] / count) for name in names]
    ratios = [np.ravel(s / (np.maximum(squares[name] / count - s, 0.0) + _FLOOR)) for name, s in zip(names, signal)]
    return float(np.concatenate(ratios).mean())


def probe_bytes(schema: Schema) -> tuple[int, int]:
    """Bytes of a question and of its answer."""
    question = Header(kind="probe", schema_digest=schema.digest, frame="0" * 16, round=1)
    of = answers(schema)
    return packed_size(question, schema), packed_size(Header(kind="block-scores", schema_digest=of.digest, frame="0" * 16, round=1), of)
