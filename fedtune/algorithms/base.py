"""What a federated algorithm is: pure functions over a frozen state. Every engine runs the same object."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedtune.types import Arrays, Assignment, ClientInfo, RoundReport, Update


@dataclass(frozen=True)
class State:
    """Everything an algorithm carries from round to round.

    `round` counts finished rounds. `arrays` is the global model. `slots` holds whatever else
    (server optimiser moments…).
    """

    round: int
    arrays: Arrays
    slots: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Algorithm:
    """init: arrays -> state. plan: (state, clients) -> assignments of the next round. step: (state,
    updates) -> (state, report).

    `plan` draws from the seed and the round number alone, so that a resumed run draws what an uninterrupted
    one would have. `step` reads its updates once, may be given none, and raises EmptyCohort when nothing can
    be averaged. settle: (state, sum, clients in it) -> (state, report), for the algorithms that need no more
    than a secure sum [length] of their updates.
    """

    init: Callable[[Arrays], State]
    plan: Callable[[State, Sequence[ClientInfo]], tuple[Assignment, ...]]
    step: Callable[[State, Iterable[Update]], tuple[State, RoundReport]]
    settle: Callable[[State, np.ndarray, Sequence[str]], tuple[State, RoundReport]] | None = None
