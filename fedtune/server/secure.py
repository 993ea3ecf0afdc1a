"""Rounds under secure aggregation over the transport: the four questions of the protocol, of which the
model packet is the first.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from fedtune.errors import SecAggFailed
from fedtune.privacy.contribution import Secure
from fedtune.round.coordinator import Coordinator
from fedtune.round.replies import Exchange, Pairs
from fedtune.secagg.server import ServerRound, Sum, run_round
from fedtune.types import RoundReport


@dataclass(frozen=True)
class SecureRounds:
    """Takes a coordinator through a round.

    Attributes:
        session: 16 bytes, of the run.
        train, later: ask the first question, and the others, which need no training.
        here: the clients that can be asked now.
    """

    secure: Secure
    session: bytes
    train: Exchange
    later: Exchange
    here: Callable[[], Collection[str]]

    def __call__(self, coordinator: Coordinator, pairs: Pairs) -> RoundReport:
        return coordinator.finish_secure(lambda refused: self._sum(coordinator, pairs, refused))

    def _sum(self, coordinator: Coordinator, pairs: Pairs, refused: dict[str, str]) -> Sum:
        round, need = coordinator.state.round + 1, self.secure.design.threshold
        if len(pairs) < need:
            raise SecAggFailed(f"{len(pairs)} devices could be asked, {need} are needed")
        server = ServerRound(
            self.secure.terms(self.session, round), [client for client, _ in pairs], self.secure.design
        )

        def ask(stage: str, questions: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | None]]:
            return self._stage(
                coordinator,
                stage,
                pairs if stage == "keys" else self._reachable(coordinator, questions),
                refused,
            )

        try:
            found = run_round(server, ask)
        finally:
            refused |= server.refused | refused
        for client in found.clients:  # in the sum, if it did not answer to the end
            refused.pop(client, None)
        return found

    def _reachable(self, coordinator: Coordinator, questions: Mapping[str, bytes]) -> Pairs:
        """The questions to those that are still there, counted as sent.

        The model packets are counted when they are planned.
        """
        here = self.here()
        pairs = [(client, question) for client, question in questions.items() if client in here]
        for client, question in pairs:
            coordinator.traffic.sent(client, len(question))
        return pairs

    def _stage(
        self, coordinator: Coordinator, stage: str, pairs: Pairs, refused: dict[str, str]
    ) -> Iterator[tuple[str, bytes | None]]:
        traffic, ask = coordinator.traffic, self.train if stage == "keys" else self.later
        for reply in ask(pairs, round=coordinator.state.round + 1):
            if stage == "keys":
                coordinator.on_reply(reply)
            if reply.payload is not None:
                traffic.received(reply.client, reply.length)
            if reply.late:
                traffic.late += 1
            elif reply.payload is None:
                refused.setdefault(reply.client, f"failed: {reply.error or 'no payload'}")
            else:
                yield reply.client, reply.payload
