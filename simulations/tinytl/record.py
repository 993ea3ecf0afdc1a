"""Accuracy of head, bias, tinytl and full against saved bytes: python simulations/tinytl/record.py DATA
[--tune] [--seeds 0,1,2] [--set KEY=VALUE ...]

DATA: a folder KIND/LABEL/FILE of images, such as PACS. --tune first finds each method's learning rate: the
best of RATES with seed 100, which is used for nothing else; the choice looks at that seed's held-out
accuracy. --set changes a key in all runs, for a trial.

Runs lie in runs/tinytl-METHOD-RATE-SEED and are resumed or read if they are there.
Writes pacs.json beside this file.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from recording import TUNED_SEED, before, fedtune, flags, simulated, spread, tuned, write  # noqa: E402

METHODS = ("head", "bias", "tinytl", "full")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def settings(
    data: Path, method: str, rate: float, seed: int, changes: Mapping[str, str]
) -> dict[str, object]:
    return {
        "data.source": data,
        "adapter.method": method,
        "federation.lr": rate,
        "federation.seed": seed,
        **changes,
    }


def run(data: Path, method: str, rate: float, seed: int, changes: Mapping[str, str]) -> dict:
    """One run's figures."""
    summary = simulated(
        f"tinytl-{method}-{rate:g}-{seed}", HERE / "pacs.toml", settings(data, method, rate, seed, changes)
    )
    sent = summary["communication"]
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "accuracy": summary["final"]["accuracy"],
        "worst_tenth": summary["final"]["worst_tenth"],
        "trainable": sent["trainable_numbers"],
        "update_bytes": sent["update_bytes"],
        "versions": summary["versions"],
    }


def kept(data: Path, method: str, changes: Mapping[str, str]) -> dict[str, int]:
    """Bytes kept for the backward pass of a step, lean and by stock torch,
    as `fedtune plan` computes them.
    """
    device = json.loads(
        fedtune(
            "plan", str(HERE / "pacs.toml"), *flags(settings(data, method, RATES[0], 0, changes)), "--json"
        )
    )["device"]
    return {"lean": device["activations"], "stock": device["activations_without_lean"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    chosen = parser.parse_args()
    path, data = HERE / "pacs.json", chosen.data.resolve()
    changes = dict(change.split("=", 1) for change in chosen.changes)
    rates = None if chosen.tune else before(path).get("rates")
    rates = rates or tuned(
        METHODS, RATES, lambda method, rate: run(data, method, rate, TUNED_SEED, changes)["accuracy"]
    )
    rows = [
        run(data, method, rates[method], int(seed), changes)
        for method in METHODS
        for seed in chosen.seeds.split(",")
    ]
    saved = {method: kept(data, method, changes) for method in METHODS}
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        print(
            f"{method:7} rate {rates[method]:g}   accuracy {spread([row['accuracy'] for row in own])}   "
            f"{own[0]['trainable']:>9,} numbers   keeps {saved[method]['lean'] / 1e6:.2f} MB, "
            f"stock torch {saved[method]['stock'] / 1e6:.2f} MB"
        )
    if not changes:  # else a trial: nothing is recorded
        write(path, {"rates": rates, "kept_bytes": saved, "runs": rows})


if __name__ == "__main__":
    main()
