"""What a client's gradients say of how much each block matters for its data.

    gradient   mean over batches of |g|^2 of the block
               (arXiv:2408.15600, section 4)
    rgn        the same over |w|^2 of the base's own weights of the block
               (arXiv:2210.11466, section 4, in squares)
    snr        mean over the block's numbers of mean(g)^2 / (var(g) + 1e-8), over batches
               (arXiv:2210.11466, section 4)
    fisher     sum over the block's tensors of |F|, F the mean over examples of g^2
               (arXiv:2310.17041, section 3)

g is the gradient of a batch's mean loss to the tensors that the job trains, with the model as the
round begins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_FLOOR = 1e-8


@dataclass(frozen=True)
class Score:
    """How a block's score is made.

    Attributes:
        part: gradient of a tensor -> what is added up of it.
        score: of a block, from the means over gradients of what `part` gives, by tensor.
        kept: float32 numbers, or as many bytes, that a probe keeps for each trained number beside the
            gradient.
        fewest: gradients that it needs.
        single: gradients are of one example each.
        relative: it is divided by |w|^2 of the base's own weights of the block.
    """

    part: Callable[[np.ndarray], np.ndarray]
    score: Callable[[Sequence[np.ndarray]], float]
    kept: int = 0
    fewest: int = 1
    single: bool = False
    relative: bool = False


def _squared_length(g: np.ndarray) -> np.ndarray:
    return np.array(np.vdot(g, g), np.float64)


def _both_moments(g: np.ndarray) -> np.ndarray:
    return np.stack([g, np.square(g)], dtype=np.float64)


def _sum(means: Sequence[np.ndarray]) -> float:
    return float(sum(means))


def _lengths(means: Sequence[np.ndarray]) -> float:
    return float(sum(np.linalg.norm(squares) for squares in means))


def _ratios(means: Sequence[np.ndarray]) -> float:
    ratios = [np.ravel(mean**2 / (np.maximum(square - mean**2, 0.0) + _FLOOR)) for mean, square in means]
    return float(np.concatenate(ratios).mean())


GRADIENT = Score(_squared_length, _sum)
RGN = Score(_squared_length, _sum, relative=True)
SNR = Score(_both_moments, _ratios, kept=4, fewest=2)
FISHER = Score(np.square, _lengths, kept=1, single=True)
