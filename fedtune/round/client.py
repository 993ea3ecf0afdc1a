"""A client's side of a round, once for whatever trains: a packet is opened, what it asks is found, the job's
method says what to train, a learner trains, the method answers, and the answer is closed. No torch.

    serial    one client at a time: with torch (`training.worker`), or on graphs without it (`edge.device`)
    stacked   a block of clients together (`simulation.vectorised`)
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from fedtune.adapters.ranks import at_rank
from fedtune.algorithms.probes import answers, block_scores, require_probing
from fedtune.bundles.bundle import Bundle
from fedtune.bundles.subspace import NAME
from fedtune.data.clients import Stream
from fedtune.data.encoded import ClientData
from fedtune.errors import Refused
from fedtune.job import Job
from fedtune.privacy.example import ExamplePrivacy, example_privacy
from fedtune.privacy.noise import Noise, noise_of
from fedtune.privacy.plan import outward
from fedtune.round import keeping
from fedtune.round.asked import Asked, answered, asked
from fedtune.round.batches import probed_batches
from fedtune.round.forward import train_forward
from fedtune.stateful.base import Client, Pull, Trained, Training
from fedtune.stateful.methods import method_of
from fedtune.stateful.store import Kept
from fedtune.types import Arrays, Metrics
from fedtune.wire import Header, Packet, Pieces, decode, encode, finite_norm, layout, packed_size

Made = TypeVar("Made")


class ClientTraining(NamedTuple):
    """A training of one client in one round.

    Attributes:
        start: all tensors that a client of this rank has, or the numbers of the directions.
        names: of the tensors that are trained and given back; None: all.
        rank: of the client's cores; 0: adapter.rank.
        pull, purpose: as `Training` has them.
        privacy: of each example, with the client's `noise`; None: trained without, and no noise.
    """

    client: str
    data: Any
    """ClientData, or a Stream where the learner takes one."""
    round: int
    start: Arrays
    pull: Pull
    purpose: str = "local"
    names: tuple[str, ...] | None = None
    rank: int = 0
    privacy: ExamplePrivacy | None = None
    noise: Noise | None = None


Train = Callable[[Sequence[ClientTraining]], Iterable[Trained]]
"""Of trainings that need nothing of each other, of one round, one rank and the same names. What comes back
holds the trained tensors alone, in the same order, to be read once. Raises Refused where a mechanism of
privacy is broken, before the first is read.
"""


class Learner(Protocol):
    """What computes for clients. `kept`: where what they keep lies, of a job whose clients keep any."""

    @property
    def job(self) -> Job: ...

    @property
    def kept(self) -> Kept | None: ...

    def open(self) -> Bundle:
        """The bundle, with all in place that training needs."""
        ...

    def train_each(self, trainings: Sequence[ClientTraining]) -> Iterable[Trained]:
        """See `Train`."""
        ...

    def passes(self, values: Arrays, data: ClientData) -> np.ndarray:
        """See `fedtune.round.forward.Passes`."""
        ...

    def gradients(
        self, model: Arrays, rank: int, data: Any, batches: Iterable[np.ndarray]
    ) -> Iterator[Arrays]:
        """Of the mean loss of each batch that predicts something, to the tensors of the blocks at least."""
        ...

    def metrics(self, arrays: Arrays, data: Any) -> Metrics:
        """Loss and accuracy of a model as it travels, or of its trained tensors, summed over the
        predictions on `data`.
        """
        ...


class Answered(NamedTuple):
    """What a client's update says. `arrays`: as they travel."""

    arrays: Arrays
    weight: float
    metrics: Metrics


Close = Callable[[Bundle, Header, Answered], Made]
"""(bundle, header of the model that came, what the update says) -> the update."""


def to_bytes(bundle: Bundle, sent: Header, said: Answered) -> bytes:
    """The update as it goes over a wire."""
    return encode(
        "update",
        bundle.schema,
        said.arrays,
        round=sent.round,
        frame=bundle.frame_digest,
        weight=said.weight,
        metrics=said.metrics,
    )


def in_process(bundle: Bundle, sent: Header, said: Answered) -> tuple[Packet, int]:
    """The update as its reader has it, and how many bytes it would have been.

    Raises Refused as reading the bytes does.
    """
    arrays = _in_one(bundle, said.arrays)
    norm = finite_norm(arrays.vector)
    header = Header(
        kind="update",
        schema_digest=bundle.schema.digest,
        frame=bundle.frame_digest,
        round=sent.round,
        weight=said.weight,
        tensors=sent.train,
        metrics={name: [total, share] for name, (total, share) in said.metrics.items()},
    )
    return Packet(header, arrays, norm), packed_size(header, bundle.schema)


def _in_one(bundle: Bundle, arrays: Arrays) -> Pieces:
    if isinstance(arrays, Pieces):
        return arrays
    held = [t for t in bundle.schema.tensors if t.name in arrays]
    vector = np.concatenate([np.asarray(arrays[t.name], np.float32).ravel() for t in held])
    return Pieces(vector, layout((t.name, t.shape) for t in held))


def answer(learner: Learner, payload: bytes, client: str, data: ClientData | Stream) -> bytes:
    """Answers a "model" packet with an "update", a "probe" with "block-scores".

    Raises Refused when the packet is not for this bundle: another schema, another frame,
    another kind, or not the whole model; and where training diverged.
    """
    bundle = learner.open()
    packet = decode(payload, bundle.schema, kinds=["model", "probe"], frame=bundle.frame_digest)
    work = asked(bundle, packet)
    if packet.header.kind == "probe":
        return _probe(learner, packet, work, client, data)
    ((_, found),) = updates(learner, train_of(learner), packet, work, [(client, data)], to_bytes)
    if isinstance(found, Refused):
        raise found
    return found


def train_of(learner: Learner) -> Train:
    """How this learner does a training of the job: with gradients, or with forward passes alone."""
    space = learner.open().subspace
    if space is None:
        return learner.train_each

    def forward(trainings: Sequence[ClientTraining]) -> list[Trained]:
        found = list[Trained]()
        for t in trainings:
            numbers = t.start[NAME].copy()
            metrics = train_forward(space, numbers, t.data, learner.job, t.round, t.client, learner.passes)
            found.append(({NAME: numbers}, metrics))
        return found

    return forward


def updates(
    learner: Learner,
    train: Train,
    packet: Packet,
    work: Asked,
    clients: Sequence[tuple[str, ClientData | Stream]],
    close: Close[Made],
) -> Iterator[tuple[str, Made | Refused]]:
    """What clients answer to this model, which `train` trains together: each an update, or why there is
    none; what they keep is written before.

    Raises RunError for what one kept and cannot be read.
    """
    job, bundle = learner.job, learner.open()
    method, privacy, round = method_of(job), example_privacy(job), packet.header.round
    names = None if method.keeps else work.names
    if method.keeps:
        begun = [
            keeping.begin(job, bundle, learner.kept, work.model, round, client, data)
            for client, data in clients
        ]
        wanted = [method.trainings(job, one) for one in begun]
        turns = [turn for its in wanted for turn in _turns(its)]
    else:  # then one client begins like any other
        any_of_them = Client(work.model, None)
        its = method.trainings(job, any_of_them)
        begun, wanted, turns = [any_of_them] * len(clients), [its] * len(clients), _turns(its) * len(clients)
    trainings = [
        ClientTraining(
            client,
            data,
            round,
            one.start,
            one.pull,
            one.purpose,
            names,
            work.rank,
            privacy,
            None if privacy is None else noise_of(job, round, client),
        )
        for (client, data), its in zip(clients, wanted)
        for one in its
    ]
    try:
        trained = _in_turns(train, trainings, turns)
    except Refused as e:  # a mechanism that is broken is broken for all
        yield from ((client, e) for client, _ in clients)
        return
    schema = bundle.manifest.spec.schema
    for (client, data), one, its in zip(clients, begun, wanted):
        own = list(islice(trained, len(its)))
        try:
            found = method.answer(job, schema, one, own)
            require_converged(found.metrics)
            if method.keeps:
                keeping.keep(method, learner.kept, client, round, found.kept)
            weight, metrics = outward(job, len(data), found.metrics)
            said = Answered(answered(bundle, found.update), weight, metrics)
            yield client, close(bundle, packet.header, said)
        except Refused as e:
            yield client, e


def _turns(trainings: Sequence[Training]) -> list[int]:
    """When each training of a client goes: one that begins where the one before it ended comes a turn
    later, any other in the first.
    """
    turns = list[int]()
    for one in trainings:
        turns.append(0 if len(one.start) == len(trainings[0].start) else turns[-1] + 1)
    return turns


def _in_turns(train: Train, trainings: Sequence[ClientTraining], turns: Sequence[int]) -> Iterator[Trained]:
    if not any(turns):  # then no model has to be there longer than its reader needs it
        return iter(train(trainings))
    trained: list[Any] = [None] * len(trainings)
    for turn in range(max(turns, default=-1) + 1):
        rows = [row for row, its in enumerate(turns) if its == turn]
        ready = [
            trainings[row]._replace(start=trained[row - 1][0] | trainings[row].start)
            if turn
            else trainings[row]
            for row in rows
        ]
        for row, found in zip(rows, train(ready)):
            trained[row] = found
    return iter(trained)


def require_converged(metrics: Metrics) -> None:
    """Raises Refused for a training whose loss is not a number."""
    if not all(math.isfinite(s) for s, _ in metrics.values()):
        raise Refused(
            "not-finite", "training diverged here: its loss is not a number; a lower federation.lr may help"
        )


def _probe(learner: Learner, packet: Packet, work: Asked, client: str, data: ClientData | Stream) -> bytes:
    job, bundle, round = learner.job, learner.open(), packet.header.round
    units, schema = require_probing(job), at_rank(bundle.manifest.spec, work.rank).schema
    batches = probed_batches(data.lengths, units, job.federation, round, client)
    gradients = learner.gradients(work.model, work.rank, data, batches)
    scores = block_scores(units.strategy, schema, gradients, bundle.manifest.weights)
    return encode("block-scores", answers(schema), scores, round=round, frame=bundle.frame_digest)


def personal_metrics(learner: Learner, arrays: Arrays, client: str, data: Any, round: int) -> Metrics | None:
    """Of the model that is the client's own after this round; None where it predicts with nothing of
    its own.
    """
    found = keeping.own_model(learner.open(), learner.kept, arrays, client, round)
    return None if found is None else learner.metrics(found, data)
