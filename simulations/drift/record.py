"""Accuracy against bytes and simulated time of what keeps unlike clients together: python
simulations/drift/record.py [--seeds 0,1,2] [--only TEXT]

Each method's learning rate is found first: the best of RATES on the Dirichlet partition with seed 100,
which is used for nothing else; the choice looks at that seed's held-out accuracy. --only takes the
methods whose name holds TEXT.
Runs lie in runs/drift-PARTITION-METHOD-RATE-SEED and are resumed or read if they are there. Each is written
to result.json when it has ended, and not made again when it stands there.
"""

import argparse
import statistics
import sys
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from recording import COLORS, TUNED_SEED, Record, draw, simulated, spread  # noqa: E402

PARTITIONS = {
    "natural": {"data.partition": "natural", "data.by": "domain"},
    "dirichlet": {"data.partition": "dirichlet", "data.alpha": 0.1},
}
METHODS: dict[str, dict[str, object]] = {
    "FedAvg": {},
    "FedProx": {"federation.proximal": 0.1},
    "FedAvgM": {"federation.server-optimizer": "fedavgm", "federation.server-momentum": 0.9},
    "FedAdam": {"federation.server-optimizer": "fedadam", "federation.server-lr": 0.01},
    "SCAFFOLD": {"federation.drift": "scaffold"},
    "FedSpeed": {"federation.drift": "fedspeed", "federation.proximal": 0.1},
    "Ditto": {"personal.method": "ditto"},
    "own heads": {"personal.method": "head"},
    "FedLoGe": {"personal.method": "loge"},
    # a client takes part in two or three of the rounds
    "FedSelect": {"personal.method": "select", "personal.every": 1},
}
RATES = (0.1, 0.3, 1.0)


def run(partition: str, method: str, rate: float, seed: int) -> dict:
    """One run's figures. `personal` is the accuracy of what clients keep, where they predict with it."""
    changes = {**PARTITIONS[partition], **METHODS[method], "federation.lr": rate, "federation.seed": seed}
    summary = simulated(
        f"drift-{partition}-{method.replace(' ', '-')}-{rate:g}-{seed}", HERE / "job.toml", changes
    )
    sent = summary["communication"]
    return {
        "accuracy": summary["final"]["accuracy"],
        "worst_tenth": summary["final"]["worst_tenth"],
        "personal": summary.get("personal", {}).get("accuracy"),
        "bytes": sent["up"] + sent["down"],
        "up": sent["up"],
        "seconds": summary["rounds"][-1]["simulated_clock"],
        "versions": summary["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    record, methods = Record(HERE / "result.json"), [method for method in METHODS if chosen.only in method]

    def row(partition: str, method: str, rate: float, seed: int) -> dict:
        wanted = {"partition": partition, "method": method, "rate": rate, "seed": seed}
        return record.row(wanted, lambda: run(**wanted))

    def score(method: str, rate: float) -> float:
        """With heads or entries of their own, the shared model lacks what clients trained:
        what counts is what they predict with.
        """
        return row("dirichlet", method, rate, TUNED_SEED)[
            "personal" if method in ("own heads", "FedSelect") else "accuracy"
        ]

    rates = {method: record.rate(method, RATES, score) for method in methods}
    rows = [
        row(partition, method, rates[method], int(seed))
        for seed in chosen.seeds.split(",")
        for partition, method in product(PARTITIONS, methods)
    ]
    for partition, method in product(PARTITIONS, methods):
        own = [row for row in rows if (row["partition"], row["method"]) == (partition, method)]
        sent, time = (statistics.mean(row[key] for row in own) for key in ("bytes", "seconds"))
        personal = [row["personal"] for row in own if row["personal"] is not None]
        cells = "   ".join(
            f"{key} {spread([row[key] for row in own])}" for key in ("accuracy", "worst_tenth")
        )
        print(
            (
                f"{partition:9} {method:9} rate {rates[method]:g}   {cells}   "
                f"{sent / 1e6:6.2f} MB   {time:6.0f} s"
            )
            + (f"   of what clients keep {spread(personal)}" if personal else "")
        )
    if not chosen.only:
        draw(
            HERE / "plot.png",
            [row | {"best": row["accuracy"] if row["personal"] is None else row["personal"]} for row in rows],
            PARTITIONS,
            {name: ({"method": name}, "o", color) for name, color in zip(METHODS, COLORS)},
            key="best",
            label="held-out accuracy of what clients predict with",
        )


if __name__ == "__main__":
    main()
