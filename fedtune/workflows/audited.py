"""A simulation with canaries in it: the job's own engine, workers, coordinator and mechanism; only who
answers, or what is in the data, differs.

`Room` says how many canaries a job has room for, and puts them with the clients that it asks most often, as
far as that is known before.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from fedtune.adapters import methods
from fedtune.algorithms import State
from fedtune.algorithms.dp_fed_avg import CLIP
from fedtune.algorithms.units import selected
from fedtune.common.seeds import generator
from fedtune.data.encoded import ClientData
from fedtune.errors import Refused, UserError
from fedtune.privacy.canaries import Canaries, ClientCanaries, Directions, View, coins
from fedtune.privacy.clipping import clip as bounded
from fedtune.privacy.plan import METRIC_CAP, PrivacyPlan
from fedtune.round.algorithm import make_algorithm
from fedtune.round.coordinator import Coordinator
from fedtune.round.replies import Exchange, Pairs, Reply
from fedtune.training.canaries import GradientCanaries, InputCanaries, SpikedStore, mislabelled
from fedtune.training.cohort import CohortTrainer
from fedtune.training.evaluate import score
from fedtune.types import Arrays, Metrics, TensorSpec
from fedtune.wire import Packet, Pieces, Schema, decode, encode
from fedtune.workflows.setup import Setup
from fedtune.workflows.simulate import Simulation

MOST = 10_000
"""Canaries unless told otherwise, or fewer where they show more: with so many, noise of half its size
shows at an epsilon of about 2.
"""
MOST_TEXTS = 1000
"""The same of input canaries, each of which is trained on."""
CLAIMED = 5.0
"""Examples that a canary client says it holds: equal weights must not listen to it."""


@dataclass(frozen=True)
class Room:
    """A job's room for canaries. `seed`: of the coins and of where canaries are."""

    setup: Setup
    plan: PrivacyPlan
    seed: int

    @cached_property
    def asked(self) -> Counter[str]:
        """Rounds in which each client is asked, by the seed; of an amplified job all rounds,
        as nobody may know in which.
        """
        if self.plan.job.privacy.amplification:
            return Counter(dict.fromkeys(self.setup.split.clients, self.plan.rounds))
        algorithm, clients = make_algorithm(self.setup.job, self.setup.schema), self.setup.store.clients
        drawn = Counter(
            a.client
            for round in range(self.setup.job.federation.rounds)
            for a in algorithm.plan(State(round, {}), clients)
        )
        return Counter({name: min(count, self.plan.budget or count) for name, count in drawn.items()})

    @cached_property
    def most_asked(self) -> list[str]:
        """All clients that are asked, those asked most first, and of those asked as often in
        an order drawn by chance.
        """
        names = list(self.asked)
        order = generator(self.seed, "canary-clients").permutation(len(names))
        return sorted((names[i] for i in order), key=lambda name: -self.asked[name])

    @cached_property
    def often(self) -> list[str]:
        """Those asked as often as any."""
        return [name for name in self.most_asked if self.asked[name] == max(self.asked.values())]

    @cached_property
    def directions(self) -> Directions:
        return Directions(sum(t.size for t in trained_of(self.setup)), self.seed)

    @property
    def view(self) -> View:
        """What there is to see of a canary of a client that is asked most."""
        release, rounds = self.plan.release([]), max(self.asked.values(), default=1)
        rate = release.sample / release.population if release.sampling == "fixed" else release.rate
        return View(self.plan.parts["update"], rate, rounds * self.plan.steps, release.sampling == "fixed")

    def clients(self, count: int) -> Canaries:
        """Clients that are canaries."""
        return Canaries(self.most_asked[:count], np.arange(count), np.arange(count), coins(count, self.seed))

    def client_room(self) -> tuple[int, int, str]:
        """(canaries that are of use, the most there can be, why no more)."""
        most = min(len(self.most_asked), self.directions.count)
        return (
            min(MOST, most),
            most,
            (
                f"{len(self.most_asked):,} clients are asked, and an update has "
                f"{self.directions.count:,} directions"
            ),
        )

    def examples(self, count: int) -> Canaries:
        """Examples with a gradient of their own, spread over as many clients as are
        asked most, or as are needed.
        """
        names = self.most_asked[: max(len(self.often), -(-count // self.directions.count))]
        return Canaries(
            names, np.arange(count) % len(names), np.arange(count) // len(names), coins(count, self.seed)
        )

    def example_room(self) -> tuple[int, int, str]:
        """As `client_room`."""
        each = self.directions.count
        return (
            min(MOST, len(self.often) * each),
            len(self.most_asked) * each,
            f"{len(self.most_asked):,} clients are asked, of whose gradients each has {each:,} directions",
        )

    def texts(self, count: int) -> tuple[Canaries, ClientData]:
        """Examples of the clients asked most, once more with a wrong label."""
        parts = [self.setup.store.train(name) for name in self.often]
        whole = ClientData(
            [e for part in parts for e in part.encoded], np.concatenate([part.labels for part in parts])
        )
        owner, rng = (
            np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
            generator(self.seed, "canary-texts"),
        )
        places = rng.permutation(len(whole))[:count]
        data = mislabelled(whole.take(places), len(self.setup.labels), rng)
        return Canaries(self.often, owner[places], np.zeros(count, np.int64), coins(count, self.seed)), data

    def text_room(self) -> tuple[int, int, str]:
        """As `client_room`. Raises UserError for a task without two labels."""
        if len(self.setup.labels) < 2:
            raise UserError(
                f"--kind input: mislabels examples, but a {self.setup.job.model.task} job has no labels "
                "to choose from; use --kind gradient"
            )
        most = sum(
            self.setup.store.clients[self.setup.split.clients.place(name)].examples for name in self.often
        )
        return min(MOST_TEXTS, most), most, f"the clients that are asked most hold {most:,} examples"


def trained_of(setup: Setup) -> tuple[TensorSpec, ...]:
    """The tensors that every client trains in every round; canaries have their directions in these."""
    return setup.schema.of_units(selected(setup.job, setup.schema, 1))


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
        audit: the canaries, and what was seen of them.
        sent: updates that left. refused: why others did not or were not taken, by client.
    """

    audit: GradientCanaries | InputCanaries | ClientCanaries
    sent: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    def answered(self, client: str, came: bool) -> None:
        """A client's round is over."""

    def silent(self, client: str) -> bool:
        """Whether it is a canary that is out and does not answer."""
        return False

    def evaluate(self, round: int, arrays: Arrays) -> Metrics | None:
        return None

    def coordinator(self, exchange: Exchange) -> Coordinator:
        found = super().coordinator(exchange)
        reply_shown, line_shown = found.on_reply, found.on_round

        def on_reply(reply: Reply) -> None:
            came = reply.payload is not None or reply.packet is not None
            self.sent += came
            self.answered(reply.client, came)
            reply_shown(reply)

        def on_round(line: dict[str, Any]) -> None:
            self.refused |= {
                client: why for client, why in line["refused"].items() if not self.silent(client)
            }
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

    def answered(self, client: str, came: bool) -> None:
        self.audit.left(client, came)

    def _trainer(self, names: tuple[str, ...] | None = None, rank: int = 0) -> CohortTrainer | None:
        found = super()._trainer(names, rank)
        if found is not None:
            found.audit = self.audit
        return found


@dataclass(kw_only=True)
class AuditedTexts(Audited):
    """Example level, from outside: input canaries, which the setup's store hides; the model is asked at
    the start and at the end.
    """

    audit: InputCanaries

    def evaluate(self, round: int, arrays: Arrays) -> Metrics | None:
        if round in (0, self.setup.job.federation.rounds):
            self.worker.open()
            methods.write(self.worker.parameters, arrays)
            found = score(
                self.model, self.audit.data, self.setup.encoder, self.setup.job.evaluation.batch_size
            )
            self.audit.scored(found.loss / np.maximum(found.count, 1))
        return None


@dataclass(kw_only=True)
class AuditedClients(Audited):
    """Client level: canary clients answer for themselves, all others train."""

    audit: ClientCanaries
    _model: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Of the round before, float64 [numbers]."""
    _known: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """In the round that is under way: the sum of the other clients' clipped updates,
    which the attacker knows.
    """
    _asked: tuple[float, frozenset[str]] = (1.0, frozenset())
    """In the round that is under way: the clip, and the canaries asked."""

    def silent(self, client: str) -> bool:
        return self.audit.silent(client)

    def run_over(self, ask: Exchange) -> None:
        super().run_over(partial(self._ask, ask))

    def coordinator(self, exchange: Exchange) -> Coordinator:
        self._live = super().coordinator(exchange)
        return self._live

    def _ask(self, ask: Exchange, pairs: Pairs, kind: str = "train", round: int = 0) -> Iterator[Reply]:
        clip = float(self._live.state.slots.get(CLIP, self.setup.job.privacy.clip))
        mine = [(client, packet) for client, packet in pairs if client in self.audit]
        self._asked, self._known = (clip, frozenset(client for client, _ in mine)), np.zeros_like(self._model)
        sent = {
            packet: decode(packet, self.setup.schema, kinds=["model"], frame=self._live.fixed.frame)
            for packet in {packet for _, packet in mine}
        }
        for client, packet in mine:
            yield Reply(client, None if self.audit.silent(client) else self._pull(client, sent[packet], clip))
        for reply in ask([pair for pair in pairs if pair[0] not in self.audit], kind=kind, round=round):
            self._known += self._other(reply, clip)
            yield reply

    def _other(self, reply: Reply, clip: float) -> np.ndarray:
        """What another client adds to the sum, as the attacker knows it;
        0 for one that does not answer or is not taken.
        """
        try:
            packet = reply.packet or decode(reply.payload or b"", self.setup.schema, kinds=["update"])
            change = {"": self._vector(packet.arrays) - self._model}
            return bounded(change, clip)[0][""]
        except Refused:
            return np.zeros_like(self._model)

    def _pull(self, client: str, packet: Packet, clip: float) -> bytes:
        schema, told, trained = (
            self.setup.schema,
            self.setup.job.privacy.metrics_noise > 0,
            Schema(trained_of(self.setup)),
        )
        update = Pieces(
            self.audit.pull(client, self._vector(packet.arrays).astype(np.float32), clip), trained.layout
        )
        metrics: Metrics = (
            {"loss": (METRIC_CAP * CLAIMED, CLAIMED), "accuracy": (CLAIMED, CLAIMED)} if told else {}
        )
        return encode(
            "update",
            schema,
            update,
            round=packet.header.round,
            frame=self._live.fixed.frame,
            weight=CLAIMED,
            metrics=metrics,
        )

    def _vector(self, arrays: Arrays) -> np.ndarray:
        """What clients train of a model or an update, float64 [numbers]."""
        return np.concatenate([arrays[t.name].ravel() for t in trained_of(self.setup)]).astype(np.float64)

    def evaluate(self, round: int, arrays: Arrays) -> Metrics | None:
        vector = self._vector(arrays)
        if round:
            self.audit.released(
                vector - self._model - self._known / self.setup.job.federation.cohort, *self._asked
            )
        self._model = vector
        return None
