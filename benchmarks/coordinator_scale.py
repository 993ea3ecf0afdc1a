"""How much a coordinator's checks and running mean cost, against a bare NumPy sum of the same arrays; and
whether memory stays flat.

    OMP_NUM_THREADS=1 python benchmarks/coordinator_scale.py [--quick] [--json]

One round of 10,000 clients, each answering with 224 cores of 64 x 64 float32 (3.67 MB), goes through
`Coordinator.finish`: bytes decoded and checked, limits applied, added up in float64. The peer adds the same
arrays, 224 separate ones an update, in place into float32 totals and checks nothing; a second one adds them
into float64 totals, as fedtune does. They take turns in blocks inside the one round; what counts is the
ratio. One thread each: OMP_NUM_THREADS=1 keeps NumPy's products to one.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fedtune.algorithms import fed_avg
from fedtune.job import parse_job
from fedtune.round.coordinator import Coordinator, start
from fedtune.round.replies import Reply
from fedtune.runs.folder import create_run
from fedtune.types import Arrays, ClientInfo, TensorSpec
from fedtune.wire import Schema, encode

FRAME = "0" * 16
# 16 MB: names, byte counts and reports of 9,000 clients take 2 or 3; five kept updates would take 18
RATIO, GROWTH_MB = 1 / 3, 16.0


@dataclass(frozen=True)
class Size:
    """What is pushed through.

    `pool`: distinct updates, taken in turn: so many that none is still in the cache at its next turn.
    """

    updates: int = 10_000
    modules: int = 224
    rank: int = 64
    block: int = 200
    pool: int = 16

    @property
    def early(self) -> int:
        """The update after which memory is read first: a tenth of all,
        when everything that is made once has been made.
        """
        return self.updates // 10


QUICK = Size(updates=400, modules=24, rank=16, block=40, pool=4)


@dataclass
class Measured:
    """Seconds of each block by contender, and resident MB (now, peak) by number of updates."""

    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {"fedtune": [], "float32": [], "float64": []}
    )
    memory: dict[int, tuple[float, float]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few hundred small updates: shows that it runs, measures nothing",
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    size = QUICK if options.quick else Size()
    measured = measure(size)
    found = targets(size, measured)
    show(size, measured, found)
    if options.json:
        print(
            json.dumps(
                {
                    "targets": found,
                    "seconds": measured.seconds,
                    "memory_mb": measured.memory,
                    "threads": threads(),
                    **vars(size),
                }
            )
        )


def measure(size: Size) -> Measured:
    """One round of `size.updates` replies, the peers between its blocks.

    Raises AssertionError when the mean is not the mean.
    """
    schema = Schema(
        tuple(TensorSpec(f"layer.{i}.R", (size.rank, size.rank), f"block.{i}") for i in range(size.modules))
    )
    rng = np.random.default_rng(0)
    pool = [
        {t.name: rng.standard_normal(t.shape, np.float32) for t in schema.tensors} for _ in range(size.pool)
    ]
    weights = [float(w) for w in rng.integers(1, 1000, size.pool)]
    payloads = [
        encode("update", schema, a, round=1, frame=FRAME, weight=w, metrics={"loss": (w, w)})
        for a, w in zip(pool, weights)
    ]
    measured = Measured()
    with tempfile.TemporaryDirectory() as folder:
        coordinator = make_coordinator(size, schema, Path(folder) / "run")
        report = coordinator.finish(replies(size, payloads, pool, measured))
    assert len(report.clients) == size.updates and not report.refused
    counts = np.bincount(np.arange(size.updates) % size.pool) * weights
    for name, array in coordinator.state.arrays.items():
        expected = np.tensordot(counts / counts.sum(), np.array([a[name] for a in pool], np.float64), 1)
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-9)
    return measured


def make_coordinator(size: Size, schema: Schema, path: Path) -> Coordinator:
    """A coordinator at round 1 that waits for all clients."""
    job = parse_job("", [f"data.clients={size.updates}", f"federation.cohort={size.updates}"])
    clients = [ClientInfo(f"client-{i:05d}", 1) for i in range(size.updates)]
    algorithm = fed_avg(seed=0, cohort=size.updates, units=schema.units)
    made = start(
        job,
        create_run(path, job, {}),
        schema,
        FRAME,
        0,
        algorithm,
        clients,
        lambda: {t.name: np.zeros(t.shape, np.float32) for t in schema.tensors},
        lambda round, arrays: None,
    )
    made.begin()
    # not by `plan`: it also makes what is sent, which is not measured here
    made._planned = dict.fromkeys((c.name for c in clients), (made.schema.units, 0))
    return made


def replies(size: Size, payloads: list[bytes], pool: list[Arrays], measured: Measured) -> Iterator[Reply]:
    """All replies in blocks; after each block the peers do the same one. A block is a multiple
    of what the mean adds at a time, so its work is done when the next reply is asked for."""
    single = [np.zeros((size.rank, size.rank), np.float32) for _ in range(size.modules)]
    double = [total.astype(np.float64) for total in single]
    for first in range(0, size.updates, size.block):
        turns = [i % size.pool for i in range(first, first + size.block)]
        began = time.perf_counter()
        for number, turn in enumerate(turns, start=first):
            yield Reply(f"client-{number:05d}", payloads[turn])
        measured.seconds["fedtune"].append(time.perf_counter() - began)
        measured.seconds["float32"].append(timed(lambda turns=turns: add(single, pool, turns)))
        measured.seconds["float64"].append(timed(lambda turns=turns: add(double, pool, turns)))
        if first + size.block in (size.early, size.updates):
            measured.memory[first + size.block] = memory()


def add(totals: list[np.ndarray], pool: list[Arrays], turns: list[int]) -> None:
    """The peer: every array of every update, in place."""
    for turn in turns:
        for total, array in zip(totals, pool[turn].values()):
            total += array


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def memory() -> tuple[float, float]:
    """Resident MB of this process: now, at its peak."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6, resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_maxrss * 1024 / 1e6


def threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", "not set")


def targets(size: Size, measured: Measured) -> list[dict]:
    """Each target with what was measured."""
    ratio = ratio_to(measured, "float32")
    growth = measured.memory[size.updates][1] - measured.memory[size.early][1]
    return [
        {
            "name": "throughput against float32 in-place add",
            "value": round(ratio, 3),
            "target": f"at least {RATIO:.3f}",
            "met": ratio >= RATIO,
        },
        {
            "name": f"peak memory growth from {size.early} to {size.updates} updates, MB",
            "value": round(growth, 1),
            "target": f"at most {GROWTH_MB:g}",
            "met": growth <= GROWTH_MB,
        },
    ]


def ratio_to(measured: Measured, peer: str) -> float:
    """Median over blocks of peer's time / our time: both of one block,
    so that a slow moment of the machine is in both.
    """
    return float(np.median(np.divide(measured.seconds[peer], measured.seconds["fedtune"])))


def show(size: Size, measured: Measured, found: list[dict]) -> None:
    """The tables for people."""
    numbers = size.modules * size.rank**2
    console = Console(width=110)
    print(
        f"{size.updates:,} updates of {size.modules} cores {size.rank} x {size.rank}: {numbers:,} numbers, "
        f"{4 * numbers / 1e6:.2f} MB each"
    )
    print(
        f"medians of {len(measured.seconds['fedtune'])} blocks of {size.block} updates; "
        f"OMP_NUM_THREADS: {threads()}"
    )
    table = Table("", "ms an update", "updates/s", "throughput, fedtune : this")
    labels = {
        "fedtune": "fedtune: decode, check, weighted float64 sum",
        "float32": "NumPy: float32 += float32",
        "float64": "NumPy: float64 += float32",
    }
    for name, label in labels.items():
        each = float(np.median(measured.seconds[name])) / size.block
        table.add_row(label, f"{1e3 * each:.2f}", f"{1 / each:,.0f}", f"{ratio_to(measured, name):.2f}")
    console.print(table)
    table = Table("after updates", "resident MB", "peak MB")
    for count, (now, peak) in measured.memory.items():
        table.add_row(f"{count:,}", f"{now:.1f}", f"{peak:.1f}")
    console.print(table)
    for target in found:
        print(
            f"{target['name']}: {target['value']}, {target['target']}: {'met' if target['met'] else 'missed'}"
        )


if __name__ == "__main__":
    main()
