"""What the record scripts share.

They are run from the root of the repository and leave their runs in runs/.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TUNED_SEED = 100
"""Learning rates are chosen with this seed, which is used for nothing else.

The choice looks at its held-out scores.
"""


def fedtune(*arguments: str) -> str:
    """Runs a command; returns what it printed to standard output."""
    command = [sys.executable, "-c", "from fedtune.cli.main import main; main()", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def flags(changes: Mapping[str, object]) -> list[str]:
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


def simulated(name: str, job: Path, changes: Mapping[str, object]) -> dict[str, Any]:
    """The summary of runs/NAME: read if it is whole, made or resumed otherwise."""
    folder = Path("runs") / name
    if not (folder / "summary.json").exists():
        begun = (folder / "run.json").exists()
        print(f"{name}: {'resumed' if begun else 'begun'}", file=sys.stderr)
        fedtune(
            "simulate",
            *(["--resume", str(folder)] if begun else [str(job), *flags(changes), "--out", str(folder)]),
        )
    return json.loads((folder / "summary.json").read_text())


def tuned(
    methods: Sequence[str], rates: Sequence[float], accuracy: Callable[[str, float], float]
) -> dict[str, float]:
    """Each method's best rate. accuracy(method, rate): of a run with TUNED_SEED."""
    found = {}
    for method in methods:
        tried = {rate: accuracy(method, rate) for rate in rates}
        found[method] = max(tried, key=lambda rate: tried[rate])
        print(f"{method}: " + ", ".join(f"{rate:g}: {value:.3f}" for rate, value in tried.items()))
    return found


COLORS = plt.get_cmap("tab10").colors


def draw(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    partitions: Iterable[str],
    groups: Mapping[str, tuple[Mapping[str, Any], str, Any]],
    key: str = "accuracy",
    label: str = "held-out accuracy",
) -> None:
    """A row of pictures for each partition: the mean of `key` against all bytes that were sent and against
    simulated time. groups: by label, the rows' own values, marker and color.
    """
    names = list(partitions)
    figure, axes = plt.subplots(
        len(names), 2, figsize=(11, 4 * len(names)), sharey="row", layout="constrained"
    )
    for across, partition in zip(axes, names):
        for axis, cost, unit, scale in zip(
            across, ("bytes", "seconds"), ("MB in all, both ways", "simulated seconds"), (1e6, 1.0)
        ):
            for group, (its, marker, color) in groups.items():
                own = [
                    row
                    for row in rows
                    if row["partition"] == partition
                    and all(row[name] == value for name, value in its.items())
                ]
                if own:
                    across_seeds = [statistics.mean(row[name] for row in own) for name in (cost, key)]
                    axis.plot(across_seeds[0] / scale, across_seeds[1], marker, color=color, label=group)
            axis.set(title=partition, xlabel=unit)
            axis.grid(alpha=0.3)
        across[0].set_ylabel(label)
    found = {text: handle for axis in axes.flat for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(found.values(), found.keys(), loc="outside right center", fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    return f"{statistics.mean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


def before(path: Path) -> dict[str, Any]:
    """What was recorded here before, if anything."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, facts: Mapping[str, Any]) -> None:
    """Records facts beside the machine they are of."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU"
    path.write_text(json.dumps({"machine": machine, **facts}, indent=2) + "\n")


class Record:
    """A file of results that grows row by row, so that a long record can be made in several goes: what stands
    there is not made again.

    `facts`: rates by method, rows of tuning runs, rows of runs, each in the file under these names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {"rates": {}, "tuned": [], "runs": []} | {
            key: value for key, value in before(path).items() if key != "machine"
        }

    def row(self, wanted: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row with these values, made if there is none. Those with TUNED_SEED are tuning runs."""
        rows = self.facts["tuned" if wanted["seed"] == TUNED_SEED else "runs"]
        if not any(wanted.items() <= row.items() for row in rows):
            rows.append(dict(wanted) | make())
            write(self.path, self.facts)
        return next(row for row in rows if wanted.items() <= row.items())

    def rate(self, method: str, rates: Sequence[float], accuracy: Callable[[str, float], float]) -> float:
        """The method's rate as recorded, or the best of `rates` now."""
        if method not in self.facts["rates"]:
            self.facts["rates"] |= tuned([method], rates, accuracy)
            write(self.path, self.facts)
        return self.facts["rates"][method]
