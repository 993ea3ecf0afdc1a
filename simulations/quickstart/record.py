"""Runs the quickstart with seeds 0, 1 and 2 and writes result.json beside this file: python simulations/quickstart/record.py

The seed draws the split, the cohorts, the head and the order of examples, so the spread is over all of these.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)


def run(seed: int, folder: Path) -> dict:
    """One run's figures, from its summary. Resumes a run that was stopped."""
    if (folder / "run.json").exists():
        arguments = ["--resume", str(folder)]
    else:
        arguments = [str(HERE / "job.toml"), "--seed", str(seed), "--out", str(folder)]
    subprocess.run([sys.executable, "-c", "from fedtune.cli.main import main; main()", "simulate", *arguments], check=True)
    summary = json.loads((folder / "summary.json").read_text())
    found, base = summary["final"], summary["baselines"]
    return {
        "seed": seed, "accuracy": found["accuracy"], "worst_tenth": found["worst_tenth"], "head": base["head"]["accuracy"],
        "alone": base["local"]["accuracy"], "federated_on_the_same_clients": base["local"]["federated"],
        "majority": base["majority"]["accuracy"],
        "up_bytes": summary["communication"]["up"], "down_bytes": summary["communication"]["down"],
        "update_bytes": summary["communication"]["update_bytes"], "trainable": summary["communication"]["trainable_numbers"],
        "onnx_int8_agreement": summary["export"]["int8"]["label_agreement"], "versions": summary["versions"],
    }


def main() -> None:
    runs = [run(seed, Path("runs") / f"quickstart-{seed}") for seed in SEEDS]
    result = {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU", "runs": runs}
    for name in ("accuracy", "worst_tenth", "head", "alone", "federated_on_the_same_clients"):
        values = [r[name] for r in runs]
        result[name] = {"mean": round(statistics.mean(values), 4), "sd": round(statistics.stdev(values), 4)}
        print(f"{name:32} {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}   " + " ".join(f"{v:.3f}" for v in values))
    gains = [r["accuracy"] - r["head"] for r in runs]
    result["gain_over_head"] = {"mean": round(statistics.mean(gains), 4), "sd": round(statistics.stdev(gains), 4)}
    (HERE / "result.json").write_text(json.dumps(result, indent=2) + "\n")




if __name__ == "__main__":
    main()
