"""A client's side of a round, bytes in and bytes out: the same for simulated and live clients."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from fedtune.adapters.methods import Parameters, attach, read, write
from fedtune.adapters.spec import AdapterSpec
from fedtune.errors import Refused
from fedtune.gradient_init import gradient_schema
from fedtune.job import Job
from fedtune.models.base import TunableModel
from fedtune.models.load import Encoder
from fedtune.privacy.example import example_privacy, first_gradient
from fedtune.privacy.noise import noise_of
from fedtune.privacy.plan import outward
from fedtune.seeds import generator
from fedtune.training.local import ClientData, train_locally, weight_gradients
from fedtune.training.private import Audit, PerExample, private_gradients, train_privately
from fedtune.types import Arrays, Metrics
from fedtune.wire import Packet, Schema, decode, encode, kind_of


@dataclass
class Worker:
    """Holds one base in memory and answers packets for any client's data.

    `frame` is asked once, when the first model arrives: it returns the frame's arrays and the first 16 digits of its hash.
    `device`: where the model is moved to then.
    """

    job: Job
    spec: AdapterSpec
    model: TunableModel
    encoder: Encoder
    frame: Callable[[], tuple[Arrays, str]]
    device: str = "cpu"
    parameters: Parameters = field(default_factory=dict)
    frame_digest: str | None = None
    audit: Audit | None = None

    @cached_property
    def gradients(self) -> PerExample:
        """By example; asked for once the adapter is on the model."""
        return PerExample(self.model, self.parameters, audit=self.audit)

    def handle(self, payload: bytes, client: str, data: ClientData) -> bytes:
        """Answers a "model" packet with an "update", a "gradient-request" with a "gradient".

        Raises Refused when the packet is not for this bundle: another schema, another frame, another kind.
        """
        if kind_of(payload) == "gradient-request":
            return self._gradient(decode(payload, Schema(()), kinds=["gradient-request"]), client, data)
        self.open()
        packet = decode(payload, self.spec.schema, kinds=["model"], frame=self.frame_digest)
        return self._train(packet, client, data)

    def open(self) -> None:
        """Puts the adapter on the model, once."""
        if self.frame_digest is None:
            arrays, digest = self.frame()
            self.parameters = attach(self.model, self.spec, arrays)
            self.model.to(self.device)
            self.frame_digest = digest

    def _train(self, packet: Packet, client: str, data: ClientData) -> bytes:
        fed, round, private = self.job.federation, packet.header.round, example_privacy(self.job)
        write(self.parameters, packet.arrays)
        if private is None:
            rng = generator(fed.seed, "local", round, client)
            metrics = train_locally(self.model, self.parameters, data, self.encoder, fed, round, rng)
            require_converged(metrics)
        else:
            metrics = train_privately(self.gradients, data, self.encoder, fed, private, round, noise_of(self.job, round, client), client)
        weight, metrics = outward(self.job, len(data), metrics)
        return encode("update", self.spec.schema, read(self.parameters), round=round, frame=self.frame_digest or "", weight=weight, metrics=metrics)

    def _gradient(self, packet: Packet, client: str, data: ClientData) -> bytes:
        if self.frame_digest is not None:
            raise Refused("kind", "a gradient of the plain base is asked for, but the adapter is on it already")
        fed, adapter, names = self.job.federation, self.job.adapter, [x.name for x in self.spec.linears]
        if private := first_gradient(self.job):
            gradients = private_gradients(self.model, names, data, self.encoder, private, noise_of(self.job, 0, client, "init"))
            return encode("gradient", gradient_schema(self.spec), gradients, round=0, weight=1.0)
        rng = generator(fed.seed, "init", 0, client)
        index = rng.permutation(len(data))[: adapter.init_examples]
        gradients = weight_gradients(self.model, names, data, self.encoder, index, fed.batch_size)
        weight, _ = outward(self.job, len(index), {})
        return encode("gradient", gradient_schema(self.spec), gradients, round=0, weight=weight)


def require_converged(metrics: Metrics) -> None:
    """Raises Refused for a training whose loss is not a number."""
    if not all(math.isfinite(s) for s, _ in metrics.values()):
        raise Refused("not-finite", "training diverged here: its loss is not a number; a lower federation.lr may help")
