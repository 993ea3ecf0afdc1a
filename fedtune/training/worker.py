"""A client's side of a round, bytes in and bytes out: the same for simulated and live clients."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np

from fedtune.adapters.fed_sb import Leading
from fedtune.adapters.methods import Parameters, attach, read, write
from fedtune.adapters.ranks import at_rank
from fedtune.adapters.spec import AdapterSpec
from fedtune.algorithms.probes import answers, block_scores, require_probing
from fedtune.bundles.bundle import Bundle
from fedtune.bundles.subspace import NAME
from fedtune.common.seeds import generator
from fedtune.data.clients import Stream
from fedtune.data.encoded import ClientData, Encoder
from fedtune.errors import Refused
from fedtune.job import Job
from fedtune.models.base import TunableModel
from fedtune.privacy.example import ExamplePrivacy, example_privacy, first_gradient
from fedtune.privacy.noise import noise_of
from fedtune.privacy.plan import outward
from fedtune.round.asked import Asked, answered, asked
from fedtune.round.batches import probed_batches
from fedtune.round.gradient_init import gradient_schema
from fedtune.stateful.base import Pull
from fedtune.stateful.methods import method_of
from fedtune.stateful.store import Kept
from fedtune.training.evaluate import Scores, score
from fedtune.training.forward import train_forward
from fedtune.training.holder import require_converged
from fedtune.training.keeping import own_model, train_keeping
from fedtune.training.local import batch_gradients, only, train_locally, weight_gradients
from fedtune.training.private import Audit, PerExample, private_gradients, train_privately
from fedtune.types import Arrays, Metrics
from fedtune.wire import Packet, Schema, decode, encode, kind_of


@dataclass
class Worker:
    """Holds one base in memory and answers packets for any client's data.

    `bundle` is asked for once, when the first model arrives.
    `device`: where the model is moved to then.
    `kept`: where clients' own state lies, of a job whose clients keep any.
    """

    job: Job
    spec: AdapterSpec
    model: TunableModel
    encoder: Encoder
    bundle: Callable[[], Bundle]
    device: str = "cpu"
    kept: Kept | None = None
    parameters: Parameters = field(default_factory=dict)
    opened: Bundle | None = None
    audit: Audit | None = None
    _gradients: dict[tuple[int, tuple[str, ...]], PerExample] = field(default_factory=dict)
    """By example, for each rank and set of tensors that was trained."""
    _leading: dict[int, Leading] = field(default_factory=dict)

    def handle(self, payload: bytes, client: str, data: ClientData) -> bytes:
        """Answers a "model" packet with an "update", a "probe" with "block-scores",
        a "gradient-request" with a "gradient".

        Raises Refused when the packet is not for this bundle: another schema, another frame,
        another kind, or not the whole model.
        """
        if kind_of(payload) == "gradient-request":
            return self._gradient(decode(payload, Schema(()), kinds=["gradient-request"]), client, data)
        bundle = self.open()
        packet = decode(payload, bundle.schema, kinds=["model", "probe"], frame=bundle.frame_digest)
        work = asked(bundle, packet)
        return (
            self._probe(bundle, packet, work, client, data)
            if packet.header.kind == "probe"
            else self._train(bundle, packet, work, client, data)
        )

    def metrics(self, arrays: Arrays, data: ClientData | Stream) -> Metrics:
        """Loss and accuracy of a model, summed over the predictions on `data`."""
        return self.scores(arrays, data).metrics()

    def scores(self, arrays: Arrays, data: ClientData | Stream) -> Scores:
        """Of a model, by example."""
        values = self.open().trained(arrays)
        write(self.parameters, values)
        return score(self.model, data, self.encoder, self.job.evaluation.batch_size)

    def open(self) -> Bundle:
        """Puts the adapter on the model, once."""
        if self.opened is None:
            bundle = self.bundle()
            self.parameters = attach(self.model, self.spec, bundle.frame)
            self.model.to(self.device)
            self.opened = bundle
        return self.opened

    def at(self, rank: int) -> AbstractContextManager[Parameters]:
        """Inside, the model is that of a client of this rank (0: the adapter's), with these parameters."""
        self.open()
        if not rank:
            return nullcontext(self.parameters)
        if rank not in self._leading:
            self._leading[rank] = Leading(self.model, self.parameters, rank)
        return self._leading[rank].installed()

    def personal(self, arrays: Arrays, client: str, data: ClientData | Stream, round: int) -> Metrics | None:
        """As `metrics`, of the model that is the client's own after this round; None where it has none."""
        found = own_model(self.open(), self.kept, arrays, client, round)
        return None if found is None else self.metrics(found, data)

    def train(
        self,
        arrays: Arrays,
        client: str,
        data: ClientData,
        round: int,
        names: tuple[str, ...] | None = None,
        pull: Pull | None = None,
        purpose: str = "local",
        rank: int = 0,
    ) -> tuple[Arrays, Metrics]:
        """A round's local training of these tensors of a model (None: all), without privacy:
        (what they became, metrics).

        pull: None is that of federation.proximal. purpose: names the draw of batches. rank: of the client,
        and so of the model's cores (0: adapter.rank).
        """
        bundle, fed = self.open(), self.job.federation
        if bundle.subspace is not None:
            numbers = arrays[NAME].copy()
            return {NAME: numbers}, train_forward(
                bundle.subspace, numbers, data, self.job, round, client, self._passes
            )
        rng = generator(fed.seed, purpose, round, client)
        with self.at(rank) as parameters, only(parameters, names) as chosen:
            write(parameters, arrays)
            metrics = train_locally(self.model, chosen, data, self.encoder, fed, round, rng, pull)
            return read(chosen), metrics

    def _train_privately(
        self, work: Asked, client: str, data: ClientData, round: int, private: ExamplePrivacy
    ) -> tuple[Arrays, Metrics]:
        fed = self.job.federation
        with self.at(work.rank) as parameters, only(parameters, work.names) as chosen:
            write(parameters, work.model)
            gradients = self._gradients.setdefault(
                (work.rank, tuple(chosen)), PerExample(self.model, chosen, audit=self.audit)
            )
            metrics = train_privately(
                gradients, data, self.encoder, fed, private, round, noise_of(self.job, round, client), client
            )
            return read(chosen), metrics

    def _passes(self, values: Arrays, data: ClientData) -> np.ndarray:
        write(self.parameters, values)
        found = score(self.model, data, self.encoder, len(data))
        return np.array([found.loss.sum(), found.correct.sum(), found.count.sum()])

    def _train(self, bundle: Bundle, packet: Packet, work: Asked, client: str, data: ClientData) -> bytes:
        round, private = packet.header.round, example_privacy(self.job)
        if method_of(self.job).keeps:
            arrays, metrics = train_keeping(
                bundle,
                self.kept,
                packet,
                client,
                data,
                lambda ask: self.train(ask.start, client, data, round, None, ask.pull, ask.purpose),
            )
        elif private is None:
            arrays, metrics = self.train(work.model, client, data, round, work.names, rank=work.rank)
            require_converged(metrics)
        else:
            arrays, metrics = self._train_privately(work, client, data, round, private)
        weight, metrics = outward(self.job, len(data), metrics)
        return encode(
            "update",
            bundle.schema,
            answered(bundle, arrays),
            round=round,
            frame=bundle.frame_digest,
            weight=weight,
            metrics=metrics,
        )

    def _probe(self, bundle: Bundle, packet: Packet, work: Asked, client: str, data: ClientData) -> bytes:
        units, fed, round, schema = (
            require_probing(self.job),
            self.job.federation,
            packet.header.round,
            at_rank(self.spec, work.rank).schema,
        )
        with (
            self.at(work.rank) as parameters,
            only(parameters, [t.name for t in schema.of_units(schema.blocks)]) as chosen,
        ):
            write(parameters, work.model)
            batches = probed_batches(data.lengths, units, fed, round, client)
            scores = block_scores(
                units.strategy,
                schema,
                batch_gradients(self.model, chosen, data, self.encoder, fed, batches),
                bundle.manifest.weights,
            )
        of = answers(schema)
        return encode("block-scores", of, scores, round=round, frame=bundle.frame_digest)

    def _gradient(self, packet: Packet, client: str, data: ClientData) -> bytes:
        if self.opened is not None:
            raise Refused(
                "kind", "a gradient of the plain base is asked for, but the adapter is on it already"
            )
        fed, adapter, names = self.job.federation, self.job.adapter, [x.name for x in self.spec.linears]
        if private := first_gradient(self.job):
            gradients = private_gradients(
                self.model, names, data, self.encoder, private, noise_of(self.job, 0, client, "init")
            )
            return encode("gradient", gradient_schema(self.spec), gradients, round=0, weight=1.0)
        rng = generator(fed.seed, "init", 0, client)
        index = rng.permutation(len(data))[: adapter.init_examples]
        gradients = weight_gradients(self.model, names, data, self.encoder, index, fed.batch_size)
        weight, _ = outward(self.job, len(index), {})
        return encode("gradient", gradient_schema(self.spec), gradients, round=0, weight=weight)
