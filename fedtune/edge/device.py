"""A device without torch: its own data, the graphs made for its bundle, and a worker."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.algorithms.probes import answers, block_scores, require_probing
from fedtune.bundles.bundle import Bundle
from fedtune.bundles.subspace import NAME
from fedtune.common.seeds import generator
from fedtune.data.clients import ClientStore, Stream
from fedtune.data.encoded import ClientData
from fedtune.data.images import ImageEncoder
from fedtune.edge.graphs import Graphs
from fedtune.edge.memory import rows_within
from fedtune.edge.training import Engine, batch_gradients, score, train_locally, train_privately
from fedtune.errors import ModelError
from fedtune.onnx.folder import EdgeCard
from fedtune.privacy.example import example_privacy
from fedtune.privacy.noise import noise_of
from fedtune.privacy.plan import outward
from fedtune.round.asked import Asked, answered, asked
from fedtune.round.batches import probed_batches
from fedtune.stateful.base import Trained, Training
from fedtune.stateful.methods import method_of
from fedtune.stateful.store import Kept
from fedtune.training.forward import train_forward
from fedtune.training.holder import Device, read_data, require_converged
from fedtune.training.keeping import Local, own_model, own_state, train_keeping
from fedtune.types import Arrays, Metrics
from fedtune.wire import Packet, Pieces, decode, encode

TOKENS, IMAGES = 256, 4
"""What goes through the graph at once where memory sets no lower bound. On MiniLM, 4 texts of 64 tokens a
time take no longer for a text than 16, and a third of the memory.
"""


@dataclass(frozen=True)
class EdgeWorker:
    """Answers packets as `fedtune.training.worker.Worker` does."""

    bundle: Bundle
    engine: Engine
    kept: Kept | None = None

    def handle(self, payload: bytes, client: str, data: ClientData | Stream) -> bytes:
        """Answers a "model" packet with an "update", a "probe" with "block-scores".

        Raises Refused when the packet is not for this bundle: another schema, another frame,
        another kind, or not the whole model.
        """
        job, schema = self.bundle.job, self.bundle.schema
        packet = decode(payload, schema, kinds=["model", "probe"], frame=self.bundle.frame_digest)
        work = asked(self.bundle, packet)
        values = self._values(packet, work)
        if packet.header.kind == "probe":
            return self._probe(packet, work, values, client, data)
        fed, round, private = job.federation, packet.header.round, example_privacy(job)
        if method_of(job).keeps:
            update, metrics = train_keeping(
                self.bundle, self.kept, packet, client, data, self._local(client, data, round)
            )
            return encode(
                "update",
                schema,
                update,
                round=round,
                frame=self.bundle.frame_digest,
                weight=float(len(data)),
                metrics=metrics,
            )
        if private is not None:
            metrics = train_privately(
                self.engine,
                values,
                data,
                fed,
                private,
                round,
                noise_of(job, round, client),
                work.names,
                work.rank,
            )
        else:
            if self.bundle.subspace is not None:
                metrics = train_forward(
                    self.bundle.subspace, values[NAME], data, job, round, client, self.engine.passes
                )
            else:
                metrics = train_locally(
                    self.engine,
                    values,
                    data,
                    fed,
                    round,
                    generator(fed.seed, "local", round, client),
                    work.names,
                    rank=work.rank,
                )
            require_converged(metrics)
        weight, metrics = outward(job, len(data), metrics)
        trained: Arrays = values if work.names is None else {name: values[name] for name in work.names}
        return encode(
            "update",
            schema,
            self._leading(trained, work.rank),
            round=round,
            frame=self.bundle.frame_digest,
            weight=weight,
            metrics=metrics,
        )

    def _values(self, packet: Packet, work: Asked) -> Pieces:
        """What the graphs take: of a client of a lower rank, with 0 where it has nothing."""
        ranks, schema = self.bundle.ranks, self.bundle.manifest.spec.schema
        if ranks is None:
            return packet.arrays
        whole = ranks.whole(work.model)
        return Pieces(np.concatenate([whole[t.name].ravel() for t in schema.tensors]), schema.layout)

    def _leading(self, trained: Arrays, rank: int) -> Arrays:
        """What a client of this rank has of them, as it travels."""
        ranks = self.bundle.ranks
        return trained if ranks is None else answered(self.bundle, ranks.leading(trained, rank))

    def _probe(
        self, packet: Packet, work: Asked, values: Pieces, client: str, data: ClientData | Stream
    ) -> bytes:
        job, schema, round = self.bundle.job, self.bundle.manifest.spec.schema, packet.header.round
        units = require_probing(job)
        batches = probed_batches(data.lengths, units, job.federation, round, client)
        gradients = batch_gradients(self.engine, values, data, batches)
        if self.bundle.ranks is not None:
            gradients = (self.bundle.ranks.leading(found, work.rank) for found in gradients)
        scores = block_scores(units.strategy, schema, gradients, self.bundle.manifest.weights)
        return encode("block-scores", answers(schema), scores, round=round, frame=self.bundle.frame_digest)

    def _local(self, client: str, data: ClientData | Stream, round: int) -> Local:
        fed, spec = self.bundle.job.federation, self.bundle.manifest.spec.schema

        def local(ask: Training) -> Trained:
            values = Pieces(np.concatenate([ask.start[t.name].ravel() for t in spec.tensors]), spec.layout)
            metrics = train_locally(
                self.engine,
                values,
                data,
                fed,
                round,
                generator(fed.seed, ask.purpose, round, client),
                None,
                ask.pull,
            )
            return values, metrics

        return local

    def personal(self, arrays: Arrays, client: str, data: ClientData | Stream, round: int) -> Metrics | None:
        """As `metrics`, of the model that is this device's own after this round; None where it has none."""
        found = own_model(self.bundle, self.kept, arrays, client, round)
        return None if found is None else self.metrics(found, data)

    def metrics(self, arrays: Arrays, data: ClientData | Stream) -> Metrics:
        """Loss and accuracy of a model, summed over the predictions on `data`."""
        return score(self.engine, self.bundle.trained(arrays), data, self.bundle.job.evaluation.batch_size)


def open_device(
    bundle: Bundle, data: Path, folder: Path, threads: int = 0, memory_mb: int = 0, kept: Path | None = None
) -> Device:
    """Checks that the graphs are those of the bundle, reads the data, and finds how much fits the memory.

    Args:
        data: what `--data` named: a file of texts or a folder of images, as the bundle's job has it.
        folder: what `fedtune prepare --edge` made with the bundle.
        threads: 0 for all cores. memory_mb: what this process may have in memory, in MB; 0 for no limit.
        kept: where this device keeps what a job lets it keep from round to round.

    Raises:
        DataError, ModelError, RunError: one line about the data, the graphs, or a bundle that is not whole.
        UserError: a limit that not even a step of one example keeps.
    """
    graphs = Graphs.open(folder, threads)
    require_same(graphs.card, bundle, folder)
    dataset, parts = read_data(bundle, data)
    engine = engine_of(graphs, bundle.job.model.max_length)
    store = ClientStore(dataset, parts, engine.encoder)
    if memory_mb:
        engine = within(engine, store.stream(np.arange(len(dataset.examples))), memory_mb)
    return Device(bundle, store, EdgeWorker(bundle, engine, own_state(bundle, kept)), streams=True)


def engine_of(graphs: Graphs, max_length: int) -> Engine:
    """With as much at once as is fastest."""
    encoder = graphs.encoder(max_length)
    return Engine(graphs, encoder, IMAGES * encoder.size if isinstance(encoder, ImageEncoder) else TOKENS)


def within(engine: Engine, data: ClientData | Stream, memory_mb: int) -> Engine:
    """The same with no more at once than the limit allows, as steps with the longest example tell.

    Raises UserError as `rows_within`.
    """
    lengths, values = engine.lengths(data), engine.graphs.zeros()
    longest = int(np.argmax(lengths))

    def run(rows: int) -> None:
        taken = data.take(np.full(rows, longest))
        batch = engine.encoder.collate(taken.encoded)  # type: ignore[arg-type]
        if engine.graphs.card.mode == "backward":
            engine.graphs.step(batch, taken.labels, np.zeros(rows, np.float32), values)
        else:
            engine.graphs.logits(batch, values)

    engine.graphs.warm()
    rows = rows_within(memory_mb, max(1, engine.span // lengths[longest]), run, engine.graphs.weights)
    return Engine(engine.graphs, engine.encoder, rows * lengths[longest])


def require_same(card: EdgeCard, bundle: Bundle, folder: Path) -> None:
    """Raises ModelError, naming both, when the graphs were made for another base, frame, task,
    or other trained tensors.
    """
    manifest, model = bundle.manifest, bundle.job.model
    both = {
        "base": (_short(card.base_sha256), _short(manifest.sha256)),
        "frame": (_short(card.frame_sha256), _short(manifest.frame_sha256)),
        "task": (card.task, manifest.task),
        "labels": (", ".join(card.labels), ", ".join(manifest.labels)),
        "edge.mode": (card.mode, bundle.job.edge.mode),
        "pooling": (card.pooling, model.pooling),
        "adapter": (
            _named(card.spec.method, card.spec.rank, card.spec.schema.digest),
            _named(manifest.spec.method, manifest.spec.rank, manifest.spec.schema.digest),
        ),
    }
    for what, (here, there) in both.items():
        if here != there:
            raise _not_of_this(folder, what, here, there)
    if card.spec != manifest.spec:
        raise _not_of_this(folder, "adapter", "scale or places differ", "those of its bundle")


def _not_of_this(folder: Path, what: str, here: str, there: str) -> ModelError:
    return ModelError(
        f"--graphs {folder}: made for the {what} {here}, the coordinator's bundle has {there}; "
        "copy the folder that `fedtune prepare --edge` made with this bundle"
    )


def _short(sha256: str) -> str:
    return f"{sha256[:12] or 'none'}…"


def _named(method: str, rank: int, digest: str) -> str:
    return f"{method} of rank {rank} ({digest})"
