"""Three adapter methods on one job, and a plot of what each costs and gives.

    python examples/sweep.py [JOB [OUT]]

Without JOB, the quickstart's job (`fedtune fetch` brings its model and data).
OUT gets a folder for each method and plot.png.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

import fedtune

QUICKSTART = Path(__file__).parents[1] / "simulations" / "quickstart" / "job.toml"
METHODS = ("fed-sb", "ffa-lora", "lora")


def main(job: str = str(QUICKSTART), out: str = "runs/sweep") -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for method in METHODS:
        one = fedtune.load_job(job, [f"adapter.method={method}", "export.onnx=false"])
        run = fedtune.simulate(one, out=Path(out) / method)
        lines = [line for line in run.rounds if line["evaluated"]]
        axes.plot(
            [line["total_bytes"] / 1e6 for line in lines],
            [line["accuracy"] for line in lines],
            "o-",
            label=method,
        )
        print(f"{method}: accuracy {lines[-1]['accuracy']:.3f} after {lines[-1]['total_bytes']:,} bytes")
    axes.set_xlabel("bytes sent in all, in MB, frames included")
    axes.set_ylabel("accuracy on held-out examples")
    axes.legend(frameon=False)
    figure.savefig(Path(out) / "plot.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main(*sys.argv[1:])
