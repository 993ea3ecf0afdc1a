"""What secure aggregation costs a client and the coordinator, against adding the same vectors without masks.

    OMP_NUM_THREADS=1 python benchmarks/secagg.py [--quick] [--json]

Whole rounds in one process without a network, with the graph that `fedtune.secagg.graph.design` gives a
cohort: once with everyone there to the end, once with a fifth of the clients gone after they shared their
seeds, which is the most work for the coordinator. A client's seconds are those of its four answers, the
median over clients; the coordinator's are all it does between first question and sum. Each sum is compared
with the plain one, bit for bit. One thread; both sides on this machine, which is faster than many a device.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from fedtune.secagg.client import ClientRound
from fedtune.secagg.graph import Design, design
from fedtune.secagg.masks import sum_plainly
from fedtune.secagg.server import ServerRound, run_round
from fedtune.secagg.terms import Terms

GONE = 0.2
CASES = [(cohort, length) for cohort in (10, 50, 100, 200) for length in (10_000, 100_000)]
QUICK = [(4, 50), (45, 50)]
BYTES, CLIENT_SECONDS, SERVER_SECONDS = 1.1, 1.0, 10.0  # of the last case


@dataclass(frozen=True)
class Row:
    """One cohort and vector.

    Seconds; bytes of one client, medians; `plain`: the same sum without masks, and 4 bytes a number.
    """

    clients: int
    numbers: int
    neighbours: int
    threshold: int
    client: float
    server: float
    server_gone: float
    server_plain: float
    up: int
    down: int
    up_plain: int


@dataclass
class Round:
    """What one round took: seconds and bytes by client, and seconds in all."""

    seconds: dict[str, float] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    whole: float = 0.0

    @property
    def server(self) -> float:
        return self.whole - sum(self.seconds.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="two small cohorts: shows that it runs, measures nothing"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    rows = [measure(*case) for case in (QUICK if options.quick else CASES)]
    found = targets(rows[-1])
    show(rows, found)
    if options.json:
        print(
            json.dumps(
                {
                    "targets": found,
                    "rows": [asdict(row) for row in rows],
                    "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
                }
            )
        )


def measure(clients: int, numbers: int) -> Row:
    """Two rounds of one cohort. Raises AssertionError when a sum is not the plain one."""
    terms, chosen = Terms(bytes(16), 1, numbers, 32), design(clients)
    rng = np.random.default_rng(0)
    vectors = {f"device-{i:03d}": rng.integers(0, 2**32, numbers, np.uint32) for i in range(clients)}
    began = time.perf_counter()
    sum_plainly(vectors.values(), terms)
    plain = time.perf_counter() - began
    whole = play(terms, chosen, vectors, 0)
    parts = play(terms, chosen, vectors, int(GONE * clients))
    return Row(
        clients,
        numbers,
        chosen.degree,
        chosen.threshold,
        median(whole.seconds.values()),
        whole.server,
        parts.server,
        plain,
        round(median(whole.up.values())),
        round(median(whole.down.values())),
        4 * numbers,
    )


def play(terms: Terms, chosen: Design, vectors: Mapping[str, np.ndarray], gone: int) -> Round:
    """One round, without the last `gone` clients from the third question on."""
    rounds, took = {name: ClientRound(terms, minimum=2) for name in vectors}, Round()
    leaving = set(list(vectors)[len(vectors) - gone :])

    def ask(stage: str, questions: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | None]]:
        for name, question in questions.items():
            if stage == "masked" and name in leaving:
                yield name, None
                continue
            began = time.perf_counter()
            answer = (
                rounds[name].masked(question, vectors[name])
                if stage == "masked"
                else getattr(rounds[name], stage)(question)
            )
            took.seconds[name] = took.seconds.get(name, 0.0) + time.perf_counter() - began
            took.up[name], took.down[name] = (
                took.up.get(name, 0) + len(answer),
                took.down.get(name, 0) + len(question),
            )
            yield name, answer

    began = time.perf_counter()
    found = run_round(ServerRound(terms, list(vectors), chosen), ask)
    took.whole = time.perf_counter() - began
    assert set(found.clients) == vectors.keys() - leaving and not found.refused
    np.testing.assert_array_equal(found.vector, sum_plainly((vectors[name] for name in found.clients), terms))
    return took


def targets(row: Row) -> list[dict]:
    """Each target with what was measured in the largest case."""
    case = f"{row.clients} clients, {row.numbers:,} numbers"
    facts = [
        ("bytes up, against no masking", row.up / row.up_plain, BYTES),
        ("client seconds", row.client, CLIENT_SECONDS),
        ("coordinator seconds, a fifth gone", row.server_gone, SERVER_SECONDS),
    ]
    return [
        {
            "name": f"{name}: {case}",
            "value": round(value, 3),
            "target": f"at most {limit:g}",
            "met": value <= limit,
        }
        for name, value, limit in facts
    ]


def show(rows: list[Row], found: list[dict]) -> None:
    """The table for people."""
    table = Table(
        "clients",
        "numbers",
        "neigh-\nbours",
        "thres-\nhold",
        "client\nms",
        "coordi-\nnator ms",
        "with a\nfifth gone",
        "no masks\nms",
        "kB up",
        "kB down",
        "up :\nno masks",
    )
    for r in rows:
        table.add_row(
            f"{r.clients}",
            f"{r.numbers:,}",
            f"{r.neighbours}",
            f"{r.threshold}",
            *(f"{1e3 * s:,.1f}" for s in (r.client, r.server, r.server_gone, r.server_plain)),
            f"{r.up / 1e3:,.1f}",
            f"{r.down / 1e3:,.1f}",
            f"{r.up / r.up_plain:.3f}",
        )
    Console(width=120).print(table)
    print(
        "one round of 32-bit numbers; client: the median of all; no masks: adding up the same "
        "vectors, and 4 bytes a number"
    )
    for target in found:
        print(
            f"{target['name']}: {target['value']}, {target['target']}: {'met' if target['met'] else 'missed'}"
        )


if __name__ == "__main__":
    main()
