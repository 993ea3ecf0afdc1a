"""Accuracy against bytes and simulated time of what keeps unlike clients together: python simulations/drift/record.py [--tune] [--seeds 0,1,2] [--only TEXT]

--tune first finds each method's learning rate: the best of RATES on the Dirichlet partition with seed 100, which is used for nothing else; the
choice looks at that seed's held-out accuracy. --only runs those whose name holds TEXT and records nothing.
Runs lie in runs/drift-PARTITION-METHOD-RATE-SEED and are resumed or read if they are there. Writes result.json beside this file.
"""

import argparse
import statistics
import sys
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from recording import TUNED_SEED, before, simulated, spread, tuned, write  # noqa: E402

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
}
RATES = (0.1, 0.3, 1.0)


def run(partition: str, method: str, rate: float, seed: int) -> dict:
    """One run's figures. `personal` is the accuracy of what clients keep, where they predict with it."""
    changes = {**PARTITIONS[partition], **METHODS[method], "federation.lr": rate, "federation.seed": seed}
    summary = simulated(f"drift-{partition}-{method.replace(' ', '-')}-{rate:g}-{seed}", HERE / "job.toml", changes)
    sent = summary["communication"]
    return {
        "partition": partition, "method": method, "rate": rate, "seed": seed, "accuracy": summary["final"]["accuracy"], "worst_tenth": summary["final"]["worst_tenth"],
        "personal": summary.get("personal", {}).get("accuracy"), "bytes": sent["up"] + sent["down"], "seconds": summary["rounds"][-1]["simulated_clock"],
        "versions": summary["versions"],
    }


def score(method: str, rate: float) -> float:
    found = run("dirichlet", method, rate, TUNED_SEED)
    return found["accuracy"] if found["personal"] is None or method != "own heads" else found["personal"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    path = HERE / "result.json"
    methods = [method for method in METHODS if chosen.only in method]
    rates = None if chosen.tune else before(path).get("rates")
    rates = rates or tuned(methods, RATES, score)
    rows = [run(partition, method, rates[method], int(seed)) for seed in chosen.seeds.split(",") for partition, method in product(PARTITIONS, methods)]
    for partition, method in product(PARTITIONS, methods):
        own = [row for row in rows if (row["partition"], row["method"]) == (partition, method)]
        sent, time = (statistics.mean(row[key] for row in own) for key in ("bytes", "seconds"))
        personal = [row["personal"] for row in own if row["personal"] is not None]
        print(f"{partition:9} {method:9} rate {rates[method]:g}   accuracy {spread([row['accuracy'] for row in own])}   {sent / 1e6:6.2f} MB   {time:6.0f} s"
              + (f"   of what clients keep {spread(personal)}" if personal else ""))
    if not chosen.only:
        write(path, {"rates": rates, "runs": rows})


if __name__ == "__main__":
    main()
