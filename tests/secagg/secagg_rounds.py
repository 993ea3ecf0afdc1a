"""Whole rounds in this process: what the tests of the protocol share."""

from collections.abc import Callable, Mapping

import numpy as np

from fedtune.secagg.client import ClientRound
from fedtune.secagg.graph import Design
from fedtune.secagg.server import ServerRound
from fedtune.secagg.terms import STAGES, Terms

SESSION = bytes(range(16))
Change = Callable[[str, str, bytes], bytes | None]
"""(stage, client, answer) -> what the coordinator gets."""


def terms(length=5, bits=32, round=3, session=SESSION):
    return Terms(session, round, length, bits)


TERMS = terms()


class Cohort:
    """`count` clients with random vectors and their coordinator.

    `drops`: the stage from which a client no longer answers.
    """

    def __init__(self, count, design=None, *, terms=TERMS, minimum=2, seed=0):
        self.terms = terms
        self.names = [f"device-{i}" for i in range(count)]
        self.design = design or Design(count - 1, count // 2 + 1)
        self.rounds = {name: ClientRound(terms, minimum=minimum) for name in self.names}
        rng = np.random.default_rng(seed)
        self.vectors = {
            n: rng.integers(0, 2**terms.bits, terms.length, np.uint64).astype(terms.dtype) for n in self.names
        }
        self.server = ServerRound(terms, self.names, self.design)

    def answer(self, stage: str, name: str, question: bytes) -> bytes:
        method = getattr(self.rounds[name], stage)
        return method(question, self.vectors[name]) if stage == "masked" else method(question)

    def ask(self, drops: Mapping[str, str] = {}, change: Change = lambda stage, name, answer: answer):
        def asked(stage, questions):
            for name, question in questions.items():
                gone = name in drops and STAGES.index(drops[name]) <= STAGES.index(stage)
                yield name, None if gone else change(stage, name, self.answer(stage, name, question))

        return asked

    def until(self, stage: str, drops: Mapping[str, str] = {}) -> dict[str, bytes]:
        """The questions of `stage`, after the stages before it."""
        ask = self.ask(drops)
        for earlier in STAGES[: STAGES.index(stage)]:
            for name, answer in ask(earlier, self.server.ask()):
                if answer is not None:
                    self.server.take(name, answer)
        return self.server.ask()
