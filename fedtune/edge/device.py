"""A device without torch: its own data, the graphs made for its bundle, and a worker."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.bundles.bundle import Bundle
from fedtune.common.seeds import generator
from fedtune.data.clients import ClientStore, Stream
from fedtune.data.encoded import ClientData
from fedtune.edge.graphs import Graphs
from fedtune.edge.memory import rows_within
from fedtune.edge.training import Engine, batch_gradients, score, train_locally, train_privately
from fedtune.errors import ModelError
from fedtune.job import Job
from fedtune.onnx.folder import EdgeCard
from fedtune.round.client import ClientTraining, answer
from fedtune.round.keeping import own_state
from fedtune.stateful.base import Trained
from fedtune.stateful.store import Kept
from fedtune.training.holder import Device, read_data
from fedtune.types import Arrays, Metrics
from fedtune.wire import Pieces

TOKENS, IMAGES = 256, 4
"""What goes through the graph at once where memory sets no lower bound. On MiniLM, 4 texts of 64 tokens a
time take no longer for a text than 16, and a third of the memory.
"""


@dataclass(frozen=True)
class EdgeWorker:
    """The learner without torch, one client after another."""

    bundle: Bundle
    engine: Engine
    kept: Kept | None = None

    @property
    def job(self) -> Job:
        return self.bundle.job

    def open(self) -> Bundle:
        return self.bundle

    def handle(self, payload: bytes, client: str, data: ClientData | Stream) -> bytes:
        """See `fedtune.round.client.answer`."""
        return answer(self, payload, client, data)

    def train_each(self, trainings: Sequence[ClientTraining]) -> list[Trained]:
        """One after another; see `fedtune.round.client.Train`."""
        return [self._train(one) for one in trainings]

    def passes(self, values: Arrays, data: ClientData) -> np.ndarray:
        """See `fedtune.round.forward.Passes`."""
        return self.engine.passes(values, data)

    def gradients(
        self, model: Arrays, rank: int, data: ClientData | Stream, batches: Iterable[np.ndarray]
    ) -> Iterator[Arrays]:
        """Of each batch's mean loss, to all tensors of a client of this rank."""
        for found in batch_gradients(self.engine, self._values(model), data, batches):
            yield self._leading(found, rank)

    def metrics(self, arrays: Arrays, data: ClientData | Stream) -> Metrics:
        """Loss and accuracy of a model, summed over the predictions on `data`."""
        return score(self.engine, self.bundle.trained(arrays), data, self.job.evaluation.batch_size)

    def _train(self, one: ClientTraining) -> Trained:
        fed, values = self.job.federation, self._values(one.start)
        if one.privacy is None or one.noise is None:
            rng = generator(fed.seed, one.purpose, one.round, one.client)
            metrics = train_locally(
                self.engine, values, one.data, fed, one.round, rng, one.names, one.pull, one.rank
            )
        else:
            metrics = train_privately(
                self.engine, values, one.data, fed, one.privacy, one.round, one.noise, one.names, one.rank
            )
        trained: Arrays = values if one.names is None else {name: values[name] for name in one.names}
        return self._leading(trained, one.rank), metrics

    def _values(self, model: Arrays) -> Pieces:
        """What the graphs take of a client's model: 0 where one of a lower rank has nothing."""
        ranks, schema = self.bundle.ranks, self.bundle.manifest.spec.schema
        whole = model if ranks is None else ranks.whole(model)
        return Pieces(np.concatenate([whole[t.name].ravel() for t in schema.tensors]), schema.layout)

    def _leading(self, arrays: Arrays, rank: int) -> Arrays:
        """What a client of this rank has of them."""
        return arrays if self.bundle.ranks is None else self.bundle.ranks.leading(arrays, rank)


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
    return Engine(graphs, encoder, encoder.span(TOKENS, IMAGES))


def within(engine: Engine, data: ClientData | Stream, memory_mb: int) -> Engine:
    """The same with no more at once than the limit allows, as steps with the longest example tell.

    Raises UserError as `rows_within`.
    """
    lengths, values = engine.lengths(data), engine.graphs.zeros()
    longest = int(np.argmax(lengths))

    def run(rows: int) -> None:
        taken = data.take(np.full(rows, longest))
        batch = engine.encoder.collate(taken.encoded)
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
