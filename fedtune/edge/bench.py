"""What a training step costs on this machine: time, memory, disk."""

import json
import statistics
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fedtune.common.seeds import generator
from fedtune.data.encoded import ClientData
from fedtune.edge.device import engine_of, within
from fedtune.edge.graphs import Graphs
from fedtune.edge.memory import peak, resident
from fedtune.onnx.folder import CARD


@dataclass(frozen=True)
class Bench:
    """Of steps over `examples` examples of the longest kind, `at_once` of them at a time.

    Attributes:
        step_seconds, step_seconds_least: median and least of `steps` steps after a first one.
        units_seconds: by block, that median where a client trains it and the head,
            and the folder has a smaller step for that.
        open_seconds: to check the folder and open the graph.
        start_bytes, peak_bytes: of this process in memory, mapped weights among them:
            before the graph was opened, and at most.
        disk_bytes: of the folder.
    """

    examples: int
    length: int
    at_once: int
    threads: int
    steps: int
    step_seconds: float
    step_seconds_least: float
    units_seconds: dict[str, float]
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
    graphs.warm()
    opened = time.perf_counter() - begin
    engine = engine_of(graphs, graphs.card.max_length)
    tokens = min(length, graphs.card.max_length) or graphs.card.max_length
    data = ClientData(
        engine.encoder.made_up([tokens] * examples, generator(0, "edge-bench")), np.zeros(examples, np.int64)
    )
    long = engine.lengths(data)[0]
    weight, values = np.full(examples, 1.0 / examples, np.float32), graphs.zeros()
    engine = within(engine, data, memory_mb)

    def timed(names: Collection[str] | None) -> list[float]:
        times = []
        for _ in range(steps + 1):
            begin = time.perf_counter()
            if graphs.card.mode == "backward":
                engine.added(values, data, weight, names)
            else:  # a step of forward passes has two
                engine.passes(values, data)
                engine.passes(values, data)
            times.append(time.perf_counter() - begin)
        return times[1:]

    times, schema = timed(None), graphs.card.spec.schema
    units = {
        block: statistics.median(timed([t.name for t in schema.of_units([block, "head"])]))
        for block in graphs.card.cuts
    }
    disk = sum((folder / name).stat().st_size for name in (CARD, *graphs.card.files))
    return Bench(
        examples,
        long,
        min(engine.span // long, examples),
        threads,
        steps,
        statistics.median(times),
        min(times),
        units,
        opened,
        start,
        peak(),
        disk,
    )
