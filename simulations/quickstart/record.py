"""Runs the quickstart with seeds 0, 1 and 2 and writes result.json beside this file: python
simulations/quickstart/record.py

The seed draws the split, the cohorts, the head and the order of examples, so the spread is over all of these.
"""

import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from recording import simulated, spread, write  # noqa: E402

SEEDS = (0, 1, 2)


def run(seed: int) -> dict:
    """One run's figures, from its summary."""
    summary = simulated(f"quickstart-{seed}", HERE / "job.toml", {"federation.seed": seed})
    found, base, sent = summary["final"], summary["baselines"], summary["communication"]
    return {
        "seed": seed,
        "accuracy": found["accuracy"],
        "worst_tenth": found["worst_tenth"],
        "head": base["head"]["accuracy"],
        "gain_over_head": found["accuracy"] - base["head"]["accuracy"],
        "alone": base["local"]["accuracy"],
        "federated_on_the_same_clients": base["local"]["federated"],
        "majority": base["majority"]["accuracy"],
        "up_bytes": sent["up"],
        "down_bytes": sent["down"],
        "update_bytes": sent["update_bytes"],
        "trainable": sent["trainable_numbers"],
        "onnx_int8_agreement": summary["export"]["int8"]["label_agreement"],
        "versions": summary["versions"],
    }


def main() -> None:
    runs = [run(seed) for seed in SEEDS]
    means = {}
    for name in (
        "accuracy",
        "worst_tenth",
        "head",
        "gain_over_head",
        "alone",
        "federated_on_the_same_clients",
    ):
        values = [r[name] for r in runs]
        means[name] = {"mean": round(statistics.mean(values), 4), "sd": round(statistics.stdev(values), 4)}
        print(f"{name:32} {spread(values)}   " + " ".join(f"{v:.3f}" for v in values))
    write(HERE / "result.json", {"runs": runs, **means})


if __name__ == "__main__":
    main()
