"""What a training step costs on this machine: time, memory, disk."""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fedtune.data.encoded import ClientData, Encoder
from fedtune.data.images import ImageEncoder
from fedtune.edge.device import engine_of
from fedtune.edge.graphs import Graphs
from fedtune.edge.memory import peak, resident, rows_within
from fedtune.edge.training import Engine
from fedtune.onnx.folder import CARD, STEP
from fedtune.seeds import generator


@dataclass(frozen=True)
class Bench:
    """Of steps over `examples` examples of the longest kind, `at_once` of them at a time.

    Attributes:
        step_seconds, step_seconds_least: median and least of `steps` steps after a first one.
        open_seconds: to check the folder and open the graph.
        start_bytes, peak_bytes: of this process in memory, mapped weights among them: before the graph was opened, and at most.
        disk_bytes: of the folder.
    """

    examples: int
    length: int
    at_once: int
    threads: int
    steps: int
    step_seconds: float
    step_seconds_least: float
    open_seconds: float
    start_bytes: int
    peak_bytes: int
    disk_bytes: int

    def dump(self) -> str:
        """JSON."""
        return json.dumps(asdict(self))


def bench(folder: Path, examples: int, length: int, steps: int, threads: int, memory_mb: int) -> Bench:
    """Runs steps on made-up examples. length: tokens of each text, 0 for as many as the job allows.

    Raises RunError or ModelError for a folder that is not whole, UserError for a limit that cannot be kept.
    """
    begin, start = time.perf_counter(), resident()
    graphs = Graphs.open(folder, threads)
    graphs.session(STEP)
    opened = time.perf_counter() - begin
    engine = engine_of(graphs, graphs.card.max_length)
    data = _made_up(engine.encoder, examples, min(length, graphs.card.max_length) or graphs.card.max_length)
    long = engine.lengths(data)[0]
    weight, values = np.full(examples, 1.0 / examples, np.float32), graphs.zeros()
    one = Engine(graphs, engine.encoder, 1)
    rows = rows_within(memory_mb, max(1, engine.span // long), lambda n: _once(one, data, n), graphs.weights)
    engine = Engine(graphs, engine.encoder, rows * long)
    times = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        engine.added(values, data, weight)
        times.append(time.perf_counter() - begin)
    disk = sum((folder / name).stat().st_size for name in (CARD, *graphs.card.files))
    return Bench(examples, long, min(rows, examples), threads, steps, statistics.median(times[1:]), min(times[1:]), opened, start, peak(), disk)


def _once(engine: Engine, data: ClientData, rows: int) -> None:
    Engine(engine.graphs, engine.encoder, 10**9).added(engine.graphs.zeros(), data.take(np.zeros(rows, np.int64)), np.zeros(rows, np.float32))


def _made_up(encoder: Encoder, examples: int, length: int) -> ClientData:
    draw = generator(0, "edge-bench")
    if isinstance(encoder, ImageEncoder):
        side = encoder.size
        encoded: list[dict[str, np.ndarray]] = [{"pixels": draw.standard_normal((3, side, side)).astype(np.float32)} for _ in range(examples)]
    else:
        types: dict[str, np.ndarray] = {"token_type_ids": np.zeros(length, np.int64)} if encoder.needs_type_ids else {}
        encoded = [{"input_ids": draw.integers(0, encoder.vocabulary, length), **types} for _ in range(examples)]
    return ClientData(encoded, np.zeros(examples, np.int64))
