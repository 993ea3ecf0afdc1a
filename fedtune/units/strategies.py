"""The strategies by which blocks are chosen: STRATEGIES names those that a job can choose.

top, bottom and both are the baselines of arXiv:2408.15600; lisa draws the order anew for each round, as
LISA (Pan et al. 2024, arXiv:2403.17919, Algorithm 1) does every K steps, here for all clients alike. The
others go by scores that clients are asked for.

To add one: its line in STRATEGIES, and its name in the job's units.strategy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedtune.common.seeds import generator
from fedtune.units.scores import FISHER, GRADIENT, RGN, SNR, Score

Order = Callable[[Sequence[str], int, int], tuple[str, ...]]
"""(blocks from the bottom up, seed, round) -> all of them, those first that a small budget trains."""


@dataclass(frozen=True)
class Strategy:
    """One strategy; with neither order nor score, every block is trained.

    Attributes:
        name: in units.strategy.
        words: which blocks a client trains, for people.
        order: None where all are trained, or where scores say which.
        score: None where nobody is asked.
        redrawn: the order is another in each round.
        from_below: the first block is always trained.
    """

    name: str
    words: str
    order: Order | None = None
    score: Score | None = None
    redrawn: bool = False
    from_below: bool = False

    @property
    def whole(self) -> bool:
        """Whether every block is trained by everyone."""
        return self.order is None and self.score is None

    @property
    def probes(self) -> bool:
        """Whether clients are asked which blocks matter to them."""
        return self.score is not None

    @property
    def varies(self) -> bool:
        """Whether a client of one budget may train other blocks in another round."""
        return self.probes or self.redrawn


def _top(blocks: Sequence[str], seed: int, round: int) -> tuple[str, ...]:
    return tuple(reversed(blocks))


def _bottom(blocks: Sequence[str], seed: int, round: int) -> tuple[str, ...]:
    return tuple(blocks)


def _both(blocks: Sequence[str], seed: int, round: int) -> tuple[str, ...]:
    """
    >>> _both(("block.0", "block.1", "block.2"), 0, 1)
    ('block.2', 'block.0', 'block.1')
    """
    return tuple(unit for pair in zip(reversed(blocks), blocks) for unit in pair)[: len(blocks)]


def _lisa(blocks: Sequence[str], seed: int, round: int) -> tuple[str, ...]:
    return tuple(blocks[i] for i in generator(seed, "units", round).permutation(len(blocks)).tolist())


PROBED = "those that matter most, by a probe"
STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("all", "all", from_below=True),
        Strategy("top", "the last", _top),
        Strategy("bottom", "the first", _bottom, from_below=True),
        Strategy("both", "last and first in turn", _both),
        Strategy("gradient", PROBED, score=GRADIENT),
        Strategy("rgn", PROBED, score=RGN),
        Strategy("snr", PROBED, score=SNR),
        Strategy("fisher", PROBED, score=FISHER),
        Strategy("lisa", "drawn for each round", _lisa, redrawn=True),
    )
}
