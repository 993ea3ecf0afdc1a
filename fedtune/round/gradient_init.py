"""A frame from the first step's gradients: asking clients for them, and their mean.

The frame itself is made by adapters.frames.

With init = "gradient-dp" the mean is one release of the Gaussian mechanism with an event of its own, and the
frame, made from nothing else, costs no more.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedtune.adapters.spec import AdapterSpec
from fedtune.algorithms.dp_fed_avg import drawn_noise
from fedtune.common.seeds import generator
from fedtune.errors import EmptyCohort, PrivacyRefused, Refused
from fedtune.job import Job
from fedtune.privacy.clipping import clip
from fedtune.privacy.noise import noise_of
from fedtune.privacy.plan import PrivacyPlan, init_batch, init_clip
from fedtune.privacy.releases import Release
from fedtune.round.replies import Reply
from fedtune.round.traffic import Traffic
from fedtune.runs.folder import RunFolder
from fedtune.runs.ledger import Ledger
from fedtune.types import Arrays, ClientInfo, TensorSpec
from fedtune.wire import Schema, decode, encode


def gradient_schema(spec: AdapterSpec) -> Schema:
    """The tensors of a gradient init: one weight gradient [outputs, inputs] per adapted linear."""
    return Schema(tuple(TensorSpec(x.name, (x.outputs, x.inputs), x.unit) for x in spec.linears))


def gradient_bytes(spec: AdapterSpec) -> tuple[int, int]:
    """Sizes of a gradient request and of its answer."""
    schema = gradient_schema(spec)
    answer = encode(
        "gradient",
        schema,
        {t.name: np.zeros(t.shape, np.float32) for t in schema.tensors},
        round=0,
        weight=1.0,
    )
    return len(encode("gradient-request", Schema(()), {}, round=0)), len(answer)


def gather_gradients(
    job: Job,
    spec: AdapterSpec,
    run: RunFolder,
    clients: Sequence[ClientInfo],
    exchange: Callable[..., Iterator[Reply]],
    plan: PrivacyPlan | None = None,
) -> tuple[Arrays, Traffic]:
    """The mean first-step gradient over drawn clients in one running sum, and what it cost in bytes.

    Weighted by examples; under privacy (`plan`) all alike, over `init_clients` whoever came: example level
    adds what holds each client's noise, client level cuts each gradient to the clip and adds noise to the
    sum, which may be noise alone.

    The release is written to the ledger before anybody is asked. Raises EmptyCohort when no
    usable gradient came, PrivacyRefused for a job whose privacy has no plan or whose noise is not
    of the size that was promised.
    """
    whole = plan is not None and plan.unit == "client"
    schema, traffic, bound = gradient_schema(spec), Traffic(), init_clip(job) if whole else math.inf
    rng = generator(job.federation.seed, "init-clients")
    drawn = np.sort(rng.choice(len(clients), size=min(job.adapter.init_clients, len(clients)), replace=False))
    names = [clients[i].name for i in drawn]
    Ledger(run.ledger).record(0, _release(job, plan, names).facts())
    request = encode("gradient-request", Schema(()), {}, round=0)
    for name in names:
        traffic.sent(name, len(request))
    came, total, sums = set[str](), 0.0, {t.name: np.zeros(t.shape) for t in schema.tensors}
    for reply in exchange([(name, request) for name in names]):
        if reply.payload is None or reply.late or reply.client in came:
            continue
        traffic.received(reply.client, len(reply.payload))
        try:
            packet = decode(reply.payload, schema, kinds=["gradient"], round=0)
            arrays = clip(packet.arrays, bound)[0] if whole else packet.arrays
        except Refused:
            continue
        weight = 1.0 if plan else packet.header.weight
        if not 0 < weight <= job.federation.max_weight:
            continue
        came.add(reply.client)
        total += weight
        for name, array in arrays.items():
            sums[name] += weight * array
    if whole:
        assert plan is not None
        noise = drawn_noise(sums, plan.init_noise * bound, noise_of(job, 0, "", "init"))
        sums = {name: s + noise[name] for name, s in sums.items()}
    elif not came:
        raise EmptyCohort(
            "no client sent a usable gradient, so the frame cannot be made; "
            'raise adapter.init-clients or use init = "weights"'
        )
    return {name: s / (job.adapter.init_clients if plan else total) for name, s in sums.items()}, traffic


def _release(job: Job, plan: PrivacyPlan | None, names: Sequence[str]) -> Release:
    if job.privacy.unit == "none":
        return Release(release="gradients", mechanism="none", unit="none", clients=job.adapter.init_clients)
    found = plan.gradients(names) if plan else None
    if found is None:
        raise PrivacyRefused(
            f'adapter.init = "{job.adapter.init}": nothing was planned that would protect '
            'the gradients; use "weights"'
        )
    return found


def init_warnings(spec: AdapterSpec, plan: PrivacyPlan | None) -> Iterator[str]:
    """Where noise leaves nothing of the first step's gradient for a frame to be made from.

    Noise of standard deviation s in each number of a matrix [m, n] has a spectral norm of about s
    (sqrt(m) + sqrt(n)). The mean gradient of L matrices is at most the clip C long, so that of a matrix, if
    all have the same share, at most C / sqrt(L), and so is its largest singular value. Below the noise no
    direction of the data can be told from the noise's own. C cancels.
    """
    if plan is None or plan.gradients([]) is None or not spec.linears:
        return
    clients = plan.job.adapter.init_clients
    # noise is added by each client, or once
    per = init_batch(plan.job)[0] * math.sqrt(clients) if plan.unit == "example" else float(clients)
    noise = [plan.init_noise / per * (math.sqrt(x.outputs) + math.sqrt(x.inputs)) for x in spec.linears]
    signal = 1 / math.sqrt(len(noise))
    drowned = sum(one >= signal for one in noise)
    if drowned:
        times = max(noise) / signal
        remedy = (
            f"init-examples {times:.2g}-fold, or init-clients {times**2:.2g}-fold"
            if plan.unit == "example"
            else f"init-clients {times:.2g}-fold"
        )
        yield (
            f'adapter.init = "gradient-dp": in {drowned} of {len(noise)} matrices the noise (spectral norm '
            f"{min(noise):.2g} to {max(noise):.2g} of the clip) covers all that their share of the gradient "
            f"can be ({signal:.2g} of the clip), so the frame is as good as random there and is paid for; "
            f'use "weights", or raise adapter.{remedy}'
        )
