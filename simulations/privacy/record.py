"""Accuracy against epsilon for Fed-SB, FFA-LoRA and FedIT: python simulations/privacy/record.py [example|client] [--tune] [--seeds 0,1,2]

--tune first finds each method's learning rate: the best of RATES at epsilon 3 with seed 100, which is used for nothing else. The
choice is itself made by looking at held-out scores, which no epsilon here covers; it is the same for all epsilons and seeds.

Runs lie in runs/privacy-LEVEL-METHOD-EPSILON-SEED and are resumed or read if they are there. Writes LEVEL.json beside this file.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
METHODS = {"fed-sb": "Fed-SB", "ffa-lora": "FFA-LoRA", "lora": "FedIT"}
EPSILONS = (1.0, 3.0, 10.0)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNED, TUNED_SEED = 3.0, 100


def run(level: str, method: str, epsilon: float, rate: float, seed: int) -> dict:
    """One run's figures. Not private at epsilon 0."""
    folder = Path("runs") / f"privacy-{level}-{method}-{epsilon:g}-{rate:g}-{seed}"
    if not (folder / "summary.json").exists():
        keys = {"adapter.method": method, "federation.lr": rate, "federation.seed": seed, **({"privacy.epsilon": epsilon} if epsilon else plain(level))}
        changes = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
        arguments = ["--resume", str(folder)] if (folder / "run.json").exists() else [str(HERE / f"{level}.toml"), *changes, "--out", str(folder)]
        subprocess.run([sys.executable, "-c", "from fedtune.cli.main import main; main()", "simulate", *arguments], check=True)
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "method": method, "epsilon": epsilon, "rate": rate, "seed": seed, "accuracy": summary["final"]["accuracy"],
        "claimed": summary["privacy"]["epsilon"], "delta": summary["job"]["privacy"]["delta"], "noise": summary["job"]["privacy"]["noise-multiplier"],
        "trainable": summary["communication"]["trainable_numbers"], "update_bytes": summary["communication"]["update_bytes"], "versions": summary["versions"],
    }


def plain(level: str) -> dict[str, object]:
    """The keys that switch the privacy of a job off."""
    off: dict[str, object] = {"privacy.unit": "none", "privacy.clip": 0.0}
    return off | ({"privacy.examples": 0} if level == "example" else {"privacy.amplification": "false"})


def tune(level: str) -> dict[str, float]:
    """The best rate of each method, and of what was not private."""
    found = {}
    for method in METHODS:
        tried = {rate: run(level, method, TUNED, rate, TUNED_SEED)["accuracy"] for rate in RATES}
        found[method] = max(tried, key=lambda rate: tried[rate])
        print(f"{method}: " + ", ".join(f"{rate:g}: {accuracy:.3f}" for rate, accuracy in tried.items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("level", choices=("example", "client"), nargs="?", default="example")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seeds", default="0,1,2")
    chosen = parser.parse_args()
    path = HERE / f"{chosen.level}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    rates = tune(chosen.level) if chosen.tune or "rates" not in before else before["rates"]
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    rows = [run(chosen.level, method, epsilon, rates[method], seed) for method in METHODS for epsilon in (*EPSILONS, 0.0) for seed in seeds]
    for method, name in METHODS.items():
        cells = []
        for epsilon in (*EPSILONS, 0.0):
            values = [r["accuracy"] for r in rows if r["method"] == method and r["epsilon"] == epsilon]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{'none' if not epsilon else f'{epsilon:g}'}: {statistics.mean(values):.3f}{spread}")
        sent = next(r["trainable"] for r in rows if r["method"] == method)
        print(f"{name:9} rate {rates[method]:g}, {sent:,} numbers   " + "   ".join(cells))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU"
    path.write_text(json.dumps({"machine": machine, "rates": rates, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
