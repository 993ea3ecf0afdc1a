"""The loop over rounds, whatever carries the packets."""

from collections.abc import Callable

from fedtune.round.coordinator import Coordinator
from fedtune.round.replies import Exchange, Pairs


def run_rounds(
    coordinator: Coordinator,
    exchange: Exchange,
    gather: Callable[[Coordinator], None] = lambda coordinator: None,
    through: Callable[[Coordinator, Pairs], object] | None = None,
) -> None:
    """Runs what is left of the run. `gather` is called before each round and may change whom the coordinator
    can draw; `through` takes it from the planned pairs to its end where one exchange is not enough.
    """
    gather(coordinator)
    coordinator.begin()
    while not coordinator.done:
        gather(coordinator)
        if questions := coordinator.probe():
            coordinator.probed(exchange(questions, round=coordinator.state.round + 1))
        pairs = coordinator.plan()
        if through is None:
            coordinator.finish(exchange(pairs, round=coordinator.state.round + 1))
        else:
            through(coordinator, pairs)
