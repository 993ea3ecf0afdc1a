"""The learner with torch, one client after another: the same for simulated and live clients."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np

from fedtune.adapters.layers.fed_sb import Leading
from fedtune.adapters.methods import Parameters, attach, read, write
from fedtune.adapters.ranks import at_rank
from fedtune.adapters.spec import AdapterSpec
from fedtune.bundles.bundle import Bundle
from fedtune.common.seeds import generator
from fedtune.data.clients import Stream
from fedtune.data.encoded import ClientData, Encoder
from fedtune.errors import Refused
from fedtune.job import Job
from fedtune.models.base import TunableModel
from fedtune.privacy.example import first_gradient
from fedtune.privacy.noise import noise_of
from fedtune.privacy.plan import outward
from fedtune.round.client import ClientTraining, answer, train_of
from fedtune.round.gradient_init import gradient_schema
from fedtune.stateful.base import Pull, Trained
from fedtune.stateful.store import Kept
from fedtune.training.evaluate import Scores, score
from fedtune.training.local import batch_gradients, only, train_locally, weight_gradients
from fedtune.training.private import Audit, PerExample, private_gradients, train_privately
from fedtune.types import Arrays, Metrics
from fedtune.wire import Schema, decode, encode, kind_of


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
        """As `fedtune.round.client.answer`, and a "gradient-request" with a "gradient".

        Raises Refused as that does.
        """
        if kind_of(payload) == "gradient-request":
            decode(payload, Schema(()), kinds=["gradient-request"])
            return self._gradient(client, data)
        return answer(self, payload, client, data)

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

    def train(
        self,
        arrays: Arrays,
        client: str,
        data: ClientData,
        round: int,
        names: tuple[str, ...] | None = None,
        rank: int = 0,
    ) -> Trained:
        """A round's local training of these tensors of a model (None: all), without privacy:
        (what they became, metrics). rank: of the client, and so of the model's cores (0: adapter.rank).
        """
        pull = Pull(self.job.federation.proximal)
        one = ClientTraining(client, data, round, arrays, pull, names=names, rank=rank)
        (found,) = train_of(self)([one])
        return found

    def train_each(self, trainings: Sequence[ClientTraining]) -> list[Trained]:
        """One after another; see `fedtune.round.client.Train`."""
        return [self._train(one) for one in trainings]

    def passes(self, values: Arrays, data: ClientData) -> np.ndarray:
        """See `fedtune.round.forward.Passes`."""
        write(self.parameters, values)
        found = score(self.model, data, self.encoder, len(data))
        return np.array([found.loss.sum(), found.correct.sum(), found.count.sum()])

    def gradients(
        self, model: Arrays, rank: int, data: ClientData, batches: Iterable[np.ndarray]
    ) -> Iterator[Arrays]:
        """Of each batch's mean loss, to the tensors of the blocks of a client of this rank."""
        schema = at_rank(self.spec, rank).schema
        names = [t.name for t in schema.of_units(schema.blocks)]
        with self.at(rank) as parameters, only(parameters, names) as chosen:
            write(parameters, model)
            yield from batch_gradients(self.model, chosen, data, self.encoder, self.job.federation, batches)

    def _train(self, one: ClientTraining) -> Trained:
        fed = self.job.federation
        with self.at(one.rank) as parameters, only(parameters, one.names) as chosen:
            write(parameters, one.start)
            if one.privacy is None or one.noise is None:
                rng = generator(fed.seed, one.purpose, one.round, one.client)
                metrics = train_locally(
                    self.model, chosen, one.data, self.encoder, fed, one.round, rng, one.pull
                )
            else:
                gradients = self._gradients.setdefault(
                    (one.rank, tuple(chosen)), PerExample(self.model, chosen, audit=self.audit)
                )
                metrics = train_privately(
                    gradients, one.data, self.encoder, fed, one.privacy, one.round, one.noise, one.client
                )
            return read(chosen), metrics

    def _gradient(self, client: str, data: ClientData) -> bytes:
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
