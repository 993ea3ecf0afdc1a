"""A frame from the first step's gradients: asking clients for them, and their mean. The frame itself is made by adapters.frames."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedtune.adapters.spec import AdapterSpec
from fedtune.errors import EmptyCohort, Refused
from fedtune.job import Job
from fedtune.ledger import Ledger
from fedtune.privacy.releases import Release
from fedtune.rounds import Reply, Traffic
from fedtune.run import RunFolder
from fedtune.seeds import generator
from fedtune.types import Arrays, ClientInfo, TensorSpec
from fedtune.wire import Schema, decode, encode


def gradient_schema(spec: AdapterSpec) -> Schema:
    """The tensors of a gradient init: one weight gradient [outputs, inputs] per adapted linear."""
    return Schema(tuple(TensorSpec(x.name, (x.outputs, x.inputs), x.unit) for x in spec.linears))


def gradient_bytes(spec: AdapterSpec) -> tuple[int, int]:
    """Sizes of a gradient request and of its answer."""
    schema = gradient_schema(spec)
    answer = encode("gradient", schema, {t.name: np.zeros(t.shape, np.float32) for t in schema.tensors}, round=0, weight=1.0)
    return len(encode("gradient-request", Schema(()), {}, round=0)), len(answer)


def gather_gradients(
    job: Job, spec: AdapterSpec, run: RunFolder, clients: Sequence[ClientInfo], exchange: Callable[..., Iterator[Reply]],
) -> tuple[Arrays, Traffic]:
    """The mean first-step gradient over drawn clients, weighted by examples, in one running sum; and what it cost in bytes.

    The release is written to the ledger before anybody is asked. Raises EmptyCohort when no usable gradient came.
    """
    Ledger(run.ledger).record(0, Release(release="gradients", mechanism="none", unit="none", clients=job.adapter.init_clients).facts())
    schema, traffic = gradient_schema(spec), Traffic()
    rng = generator(job.federation.seed, "init-clients")
    drawn = rng.choice(len(clients), size=min(job.adapter.init_clients, len(clients)), replace=False)
    request = encode("gradient-request", Schema(()), {}, round=0)
    for i in drawn:
        traffic.sent(clients[i].name, len(request))
    total, sums = 0.0, {t.name: np.zeros(t.shape) for t in schema.tensors}
    for reply in exchange([(clients[i].name, request) for i in sorted(drawn)]):
        if reply.payload is None or reply.late:
            continue
        traffic.received(reply.client, len(reply.payload))
        try:
            packet = decode(reply.payload, schema, kinds=["gradient"], round=0)
        except Refused:
            continue
        if packet.header.weight > job.federation.max_weight:
            continue
        total += packet.header.weight
        for name, array in packet.arrays.items():
            sums[name] += packet.header.weight * array
    if total <= 0:
        raise EmptyCohort("no client sent a usable gradient, so the frame cannot be made; raise adapter.init-clients or use init = \"weights\"")
    return {name: s / total for name, s in sums.items()}, traffic
