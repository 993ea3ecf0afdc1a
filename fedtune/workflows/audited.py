"""A simulation with canaries in it: the job's own engine, workers, coordinator and mechanism; only who answers, or what is in the data, differs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from fedtune.adapters import methods
from fedtune.algorithms.dp_fed_avg import CLIP
from fedtune.errors import Refused
from fedtune.privacy.canary_clients import ClientCanaries
from fedtune.privacy.clipping import clip as bounded
from fedtune.privacy.plan import METRIC_CAP
from fedtune.rounds import Coordinator, Reply
from fedtune.server.app import Ask, Pairs
from fedtune.training.canaries import GradientCanaries, InputCanaries, SpikedStore
from fedtune.training.cohort import CohortTrainer
from fedtune.training.evaluate import score
from fedtune.training.local import ClientData
from fedtune.types import Arrays, Metrics
from fedtune.wire import Packet, Pieces, decode, encode
from fedtune.workflows.setup import Setup
from fedtune.workflows.simulate import Simulation

CLAIMED = 5.0
"""Examples that a canary client says it holds: equal weights must not listen to it."""


@dataclass(frozen=True)
class SpikedSetup(Setup):
    """A setup whose clients' data hold canaries."""

    hide: Callable[[str, ClientData], ClientData]

    @cached_property
    def store(self) -> SpikedStore:
        return SpikedStore(self.dataset, self.split, self.encoder, hide=self.hide)


def spiked(setup: Setup, hide: Callable[[str, ClientData], ClientData]) -> SpikedSetup:
    """`hide`: a client's data, from its name and data, with its canaries."""
    return SpikedSetup(setup.job, setup.source, setup.sha256, setup.labels, setup.dataset, setup.split, hide)


@dataclass(kw_only=True)
class Audited(Simulation):
    """What all audits share: nothing is scored on held-out data, and who held an update back is known.

    Attributes:
        sent: updates that left. refused: why others did not or were not taken, by client.
    """

    sent: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def evidence(self) -> np.ndarray:
        """What was seen of each canary, float64 [m]; see `privacy.audit.take_guesses`."""
        raise NotImplementedError

    @property
    def asked(self) -> Mapping[str, int]:
        """In how many rounds each canary's client was asked, as far as that is seen."""
        return {}

    def answered(self, client: str, came: bool) -> None:
        """A client's round is over."""

    def silent(self, client: str) -> bool:
        """Whether it is a canary that is out and does not answer."""
        return False

    def evaluate(self, round: int, arrays: Arrays) -> Metrics | None:
        return None

    def coordinator(self, exchange: Ask) -> Coordinator:
        found = super().coordinator(exchange)
        reply_shown, line_shown = found.on_reply, found.on_round

        def on_reply(reply: Reply) -> None:
            came = reply.payload is not None or reply.packet is not None
            self.sent += came
            self.answered(reply.client, came)
            reply_shown(reply)

        def on_round(line: dict[str, Any]) -> None:
            self.refused |= {client: why for client, why in line["refused"].items() if not self.silent(client)}
            line_shown(line)

        found.on_reply, found.on_round = on_reply, on_round
        return found


@dataclass(kw_only=True)
class AuditedSteps(Audited):
    """Example level, inside the mechanism: gradient canaries, which the setup's store hides."""

    audit: GradientCanaries

    def __post_init__(self) -> None:
        super().__post_init__()
        self.worker.audit = self.audit

    @property
    def evidence(self) -> np.ndarray:
        return self.audit.sight.evidence()

    @property
    def asked(self) -> Mapping[str, int]:
        return self.audit.asked

    def answered(self, client: str, came: bool) -> None:
        self.audit.left(client, came)

    def _trainer(self) -> CohortTrainer | None:
        found = super()._trainer()
        if found is not None:
            found.audit = self.audit
        return found


@dataclass(kw_only=True)
class AuditedTexts(Audited):
    """Example level, from outside: input canaries, which the setup's store hides; the model is asked at the start and at the end."""

    audit: InputCanaries

    @property
    def evidence(self) -> np.ndarray:
        return self.audit.found

    def evaluate(self, round: int, arrays: Arrays) -> Metrics | None:
        if round in (0, self.setup.job.federation.rounds):
            self.worker.open()
            methods.write(self.worker.parameters, arrays)
            found = score(self.model, self.audit.data, self.setup.encoder, self.setup.job.evaluation.batch_size)
            self.audit.scored(found.loss / np.maximum(found.count, 1))
        return None


@dataclass(kw_only=True)
class AuditedClients(Audited):
    """Client level: canary clients answer for themselves, all others train."""

    audit: ClientCanaries
    _model: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Of the round before, float64 [numbers]."""
    _known: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """In the round that is under way: the sum of the other clients' clipped updates, which the attacker knows."""
    _asked: tuple[float, frozenset[str]] = (1.0, frozenset())
    """In the round that is under way: the clip, and the canaries asked."""

    @property
    def evidence(self) -> np.ndarray:
        return self.audit.sight.evidence()

    @property
    def asked(self) -> Mapping[str, int]:
        return self.audit.asked

    def silent(self, client: str) -> bool:
        return self.audit.silent(client)

    def run_over(self, ask: Ask) -> None:
        super().run_over(partial(self._ask, ask))

    def coordinator(self, exchange: Ask) -> Coordinator:
        self._live = super().coordinator(exchange)
        return self._live

    def _ask(self, ask: Ask, pairs: Pairs, kind: str = "train", round: int = 0) -> Iterator[Reply]:
        clip = float(self._live.state.slots.get(CLIP, self.setup.job.privacy.clip))
        mine = [(client, packet) for client, packet in pairs if client in self.audit]
        self._asked, self._known = (clip, frozenset(client for client, _ in mine)), np.zeros_like(self._model)
        sent = {packet: decode(packet, self.setup.spec.schema, kinds=["model"], frame=self._live.frame_digest) for packet in {packet for _, packet in mine}}
        for client, packet in mine:
            yield Reply(client, None if self.audit.silent(client) else self._pull(client, sent[packet], clip))
        for reply in ask([pair for pair in pairs if pair[0] not in self.audit], kind=kind, round=round):
            self._known += self._other(reply, clip)
            yield reply

    def _other(self, reply: Reply, clip: float) -> np.ndarray:
        """What another client adds to the sum, as the attacker knows it; 0 for one that does not answer or is not taken."""
        try:
            packet = reply.packet or decode(reply.payload or b"", self.setup.spec.schema, kinds=["update"])
            change = {"": packet.arrays.vector.astype(np.float64) - self._model}
            return bounded(change, clip)[0][""]
        except Refused:
            return np.zeros_like(self._model)

    def _pull(self, client: str, packet: Packet, clip: float) -> bytes:
        schema, told = self.setup.spec.schema, self.setup.job.privacy.metrics_noise > 0
        update = Pieces(self.audit.pull(client, packet.arrays.vector, clip), schema.layout)
        metrics: Metrics = {"loss": (METRIC_CAP * CLAIMED, CLAIMED), "accuracy": (CLAIMED, CLAIMED)} if told else {}
        return encode("update", schema, update, round=packet.header.round, frame=self._live.frame_digest, weight=CLAIMED, metrics=metrics)

    def evaluate(self, round: int, arrays: Arrays) -> Metrics | None:
        vector = np.concatenate([arrays[t.name].ravel() for t in self.setup.spec.trainable]).astype(np.float64)
        if round:
            self.audit.released(vector - self._model - self._known / self.setup.job.federation.cohort, *self._asked)
        self._model = vector
        return None
