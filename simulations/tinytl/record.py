"""Accuracy of head, bias, tinytl and full against saved bytes: python simulations/tinytl/record.py DATA [--tune] [--seeds 0,1,2] [--set KEY=VALUE ...]

DATA: a folder KIND/LABEL/FILE of images, such as PACS. --tune first finds each method's learning rate: the best of RATES with seed
100, which is used for nothing else; the choice looks at that seed's held-out accuracy. --set changes a key in all runs, for a trial.

Runs lie in runs/tinytl-METHOD-RATE-SEED and are resumed or read if they are there. Writes pacs.json beside this file.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
METHODS = ("head", "bias", "tinytl", "full")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TUNED_SEED = 100


def fedtune(*arguments: str) -> str:
    command = [sys.executable, "-c", "from fedtune.cli.main import main; main()", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def settings(data: Path, method: str, rate: float, seed: int, changes: Sequence[str]) -> list[str]:
    keys = [f"data.source={data}", f"adapter.method={method}", f"federation.lr={rate}", f"federation.seed={seed}", *changes]
    return [str(HERE / "pacs.toml"), *(part for key in keys for part in ("--set", key))]


def run(data: Path, method: str, rate: float, seed: int, changes: Sequence[str]) -> dict:
    """One run's figures."""
    folder = Path("runs") / f"tinytl-{method}-{rate:g}-{seed}"
    if not (folder / "summary.json").exists():
        begun = (folder / "run.json").exists()
        fedtune("simulate", *(["--resume", str(folder)] if begun else [*settings(data, method, rate, seed, changes), "--out", str(folder)]))
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "method": method, "rate": rate, "seed": seed, "accuracy": summary["final"]["accuracy"], "worst_tenth": summary["final"]["worst_tenth"],
        "trainable": summary["communication"]["trainable_numbers"], "update_bytes": summary["communication"]["update_bytes"], "versions": summary["versions"],
    }


def kept(data: Path, method: str, changes: Sequence[str]) -> dict[str, int]:
    """Bytes kept for the backward pass of a step, lean and by stock torch, as `fedtune plan` computes them."""
    device = json.loads(fedtune("plan", *settings(data, method, RATES[0], 0, changes), "--json"))["device"]
    return {"lean": device["activations"], "stock": device["activations_without_lean"]}


def tune(data: Path, changes: Sequence[str]) -> dict[str, float]:
    found = {}
    for method in METHODS:
        tried = {rate: run(data, method, rate, TUNED_SEED, changes)["accuracy"] for rate in RATES}
        found[method] = max(tried, key=lambda rate: tried[rate])
        print(f"{method}: " + ", ".join(f"{rate:g}: {accuracy:.3f}" for rate, accuracy in tried.items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    chosen = parser.parse_args()
    path, data = HERE / "pacs.json", chosen.data.resolve()
    before = json.loads(path.read_text()) if path.exists() else {}
    rates = before.get("rates") if not chosen.tune and "rates" in before else tune(data, chosen.changes)
    rows = [run(data, method, rates[method], int(seed), chosen.changes) for method in METHODS for seed in chosen.seeds.split(",")]
    saved = {method: kept(data, method, chosen.changes) for method in METHODS}
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        values = [row["accuracy"] for row in own]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        print(f"{method:7} rate {rates[method]:g}   accuracy {statistics.mean(values):.3f}{spread}   {own[0]['trainable']:>9,} numbers   "
              f"keeps {saved[method]['lean'] / 1e6:.2f} MB, stock torch {saved[method]['stock'] / 1e6:.2f} MB")
    if chosen.changes:
        return  # a trial: nothing is recorded
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU"
    path.write_text(json.dumps({"machine": machine, "rates": rates, "kept_bytes": saved, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
