"""What a caller may follow of a run."""

from collections.abc import Callable
from dataclasses import dataclass

from fedtune.round.replies import Reply


@dataclass(frozen=True)
class Watch:
    """What a caller may follow, in the thread that runs the rounds.

    stage(text, total): work of `total` steps begins, of which advance(count) finishes some; total 0
    is unknown. reply: a client's answer came. line: a round is finished, as metrics.jsonl has it.
    note: one line worth knowing.
    """

    stage: Callable[[str, int], None] = lambda text, total: None
    advance: Callable[[int], None] = lambda count: None
    reply: Callable[[Reply], None] = lambda reply: None
    line: Callable[[dict], None] = lambda line: None
    note: Callable[[str], None] = lambda text: None
