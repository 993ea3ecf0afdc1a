"""Accuracy against bytes and simulated time for the strategies of [units]: python simulations/units/record.py
[--seeds 0,1,2] [--only TEXT]

All strategies run with the same learning rate, that of the quickstart. --only takes those whose name holds
TEXT, and draws nothing. Runs lie in runs/units-PARTITION-BUDGET-STRATEGY-SEED and are resumed or read if
they are there. Each is written to result.json when it has ended, and not made again when it stands there;
plot.png is drawn at the end.
"""

import argparse
import json
import statistics
import sys
import tomllib
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from recording import COLORS, Record, draw, simulated, spread  # noqa: E402

PARTITIONS = {
    "natural": {"data.partition": "natural", "data.by": "domain"},
    "dirichlet": {"data.partition": "dirichlet", "data.alpha": 0.1},
}
BUDGETS = {"1": (1, 1, 1), "2": (2, 2, 2), "mixed": (1, 2, 4)}
"""Blocks of the classes of devices in their order."""
CLASSES = tomllib.loads((HERE / "job.toml").read_text())["simulation"]["devices"]
STRATEGIES = {
    **{
        name: {"units.strategy": name}
        for name in ("top", "bottom", "both", "lisa", "gradient", "rgn", "snr", "fisher")
    },
    "gradient, consistency 0.1": {"units.strategy": "gradient", "units.consistency": 0.1},
}


def name_of(partition: str, budget: str, strategy: str, seed: int) -> str:
    return f"units-{partition}-{budget}-{strategy.replace(', consistency ', '-')}-{seed}"


def with_units(blocks: tuple[int, ...]) -> str:
    """The job's classes of devices as TOML, each with its number of blocks."""
    tables = [{**device, "units": count} for device, count in zip(CLASSES, blocks, strict=True)]
    return (
        "["
        + ", ".join(
            "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"
            for table in tables
        )
        + "]"
    )


def run(partition: str, budget: str, strategy: str, seed: int) -> dict:
    """One run's figures. Budget and strategy "all" train every block."""
    changes: dict[str, object] = {**PARTITIONS[partition], "federation.seed": seed}
    if strategy != "all":
        changes |= {
            "units.budget": BUDGETS[budget][0],
            **STRATEGIES[strategy],
            "simulation.devices": with_units(BUDGETS[budget]),
        }
    summary = simulated(name_of(partition, budget, strategy, seed), HERE / "job.toml", changes)
    sent = summary["communication"]
    return {
        "accuracy": summary["final"]["accuracy"],
        "worst_tenth": summary["final"]["worst_tenth"],
        "bytes": sent["up"] + sent["down"],
        "up": sent["up"],
        "probes": sent["probes"],
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
    cases = [(partition, "all", "all") for partition in PARTITIONS] + list(
        product(PARTITIONS, BUDGETS, STRATEGIES)
    )
    wanted = [(*case, int(seed)) for seed in chosen.seeds.split(",") for case in cases]
    record = Record(HERE / "result.json")
    rows = [
        record.row(dict(zip(("partition", "budget", "strategy", "seed"), case)), lambda case=case: run(*case))
        for case in wanted
        if chosen.only in name_of(*case)
    ]
    for case in cases:
        own = [row for row in rows if (row["partition"], row["budget"], row["strategy"]) == case]
        if own:
            sent, up, time = (statistics.mean(row[key] for row in own) for key in ("bytes", "up", "seconds"))
            whole = {
                row["seed"]: row["accuracy"]
                for row in rows
                if (row["partition"], row["strategy"]) == (case[0], "all")
            }
            beside = [row["accuracy"] - whole[row["seed"]] for row in own if row["seed"] in whole]
            cells = "   ".join(
                f"{key} {spread([row[key] for row in own])}" for key in ("accuracy", "worst_tenth")
            )
            paired = (
                f"   {statistics.mean(beside):+.3f} against all blocks, seed by seed"
                if beside and case[2] != "all"
                else ""
            )
            print(
                f"{case[0]:9} budget {case[1]:5} {case[2]:25} {cells}   {sent / 1e6:6.2f} MB, "
                f"{up / 1e6:5.2f} up   {time:6.0f} s{paired}"
            )
    if not chosen.only:
        colors, markers = dict(zip(("all", *STRATEGIES), COLORS)), dict(zip(("all", *BUDGETS), "*o^s"))
        draw(
            HERE / "plot.png",
            rows,
            PARTITIONS,
            {
                f"{strategy}, budget {budget}" if strategy != "all" else "all blocks": (
                    {"strategy": strategy, "budget": budget},
                    markers[budget],
                    colors[strategy],
                )
                for _, budget, strategy in cases
            },
        )


if __name__ == "__main__":
    main()
