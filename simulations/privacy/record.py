"""Accuracy against epsilon for Fed-SB, FFA-LoRA and FedIT: python simulations/privacy/record.py
[example|client] [--seeds 0,1,2] [--methods fed-sb,ffa-lora,lora] [--epsilons 1,3,10,0]

Each method's learning rate is found first, and at client level with it the clip: the best of RATES and CLIPS
at epsilon 3 with seed 100, which is used for nothing else. The choice is itself made by looking at held-out
scores, which no epsilon here covers; it is the same for all epsilons and seeds.

Runs lie in runs/privacy-LEVEL-METHOD-EPSILON-RATE-CLIP-SEED and are resumed or read if they are there. Each
is written to LEVEL.json beside this file when it has ended, and not made again when it stands there.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from recording import TUNED_SEED, Record, simulated, spread  # noqa: E402

METHODS = {"fed-sb": "Fed-SB", "ffa-lora": "FFA-LoRA", "lora": "FedIT"}
RATES = (1e-2, 3e-2, 1e-1)
CLIPS = {"example": (0.5,), "client": (0.3, 1.0, 3.0)}
TUNED = 3.0


def run(level: str, method: str, epsilon: float, rate: float, clip: float, seed: int) -> dict:
    """One run's figures. Not private at epsilon 0."""
    changes = {
        "adapter.method": method,
        "federation.lr": rate,
        "federation.seed": seed,
        **({"privacy.epsilon": epsilon, "privacy.clip": clip} if epsilon else plain(level)),
    }
    summary = simulated(
        f"privacy-{level}-{method}-{epsilon:g}-{rate:g}-{clip:g}-{seed}", HERE / f"{level}.toml", changes
    )
    return {
        "accuracy": summary["final"]["accuracy"],
        "claimed": summary["privacy"]["epsilon"],
        "delta": summary["job"]["privacy"]["delta"],
        "noise": summary["job"]["privacy"]["noise-multiplier"],
        "trainable": summary["communication"]["trainable_numbers"],
        "update_bytes": summary["communication"]["update_bytes"],
        "versions": summary["versions"],
    }


def plain(level: str) -> dict[str, object]:
    """The keys that switch the privacy of a job off."""
    off: dict[str, object] = {"privacy.unit": "none", "privacy.clip": 0.0}
    return off | ({"privacy.examples": 0} if level == "example" else {"privacy.amplification": "false"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("level", choices=("example", "client"), nargs="?", default="example")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--epsilons", default="1,3,10,0", help="0: without privacy")
    chosen = parser.parse_args()
    methods, epsilons, record = (
        chosen.methods.split(","),
        [float(epsilon) for epsilon in chosen.epsilons.split(",")],
        Record(HERE / f"{chosen.level}.json"),
    )

    def row(method: str, epsilon: float, rate: float, clip: float, seed: int) -> dict:
        wanted = {
            "method": method,
            "epsilon": epsilon,
            "rate": rate,
            "clip": clip if epsilon else 0.0,
            "seed": seed,
        }
        return record.row(wanted, lambda: run(chosen.level, **wanted))

    def best_clip(method: str, rate: float) -> tuple[float, float]:
        """(accuracy, clip)"""
        return max(
            (row(method, TUNED, rate, clip, TUNED_SEED)["accuracy"], clip) for clip in CLIPS[chosen.level]
        )

    rates = {
        method: record.rate(method, RATES, lambda method, rate: best_clip(method, rate)[0])
        for method in methods
    }
    clips = {method: best_clip(method, rates[method])[1] for method in methods}
    rows = [
        row(method, epsilon, rates[method], clips[method], int(seed))
        for seed in chosen.seeds.split(",")
        for method in methods
        for epsilon in epsilons
    ]
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        cells = [
            f"{epsilon or 'none'}: " + spread([row["accuracy"] for row in own if row["epsilon"] == epsilon])
            for epsilon in epsilons
        ]
        print(
            (
                f"{METHODS[method]:9} rate {rates[method]:g}, clip {clips[method]:g}, "
                f"{own[0]['trainable']:,} numbers   "
            )
            + "   ".join(cells)
        )


if __name__ == "__main__":
    main()
