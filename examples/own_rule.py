"""An aggregation rule of one's own: the geometric median of the updates.

    python examples/own_rule.py                      # the quickstart's job, for some minutes
    python examples/own_rule.py job.toml runs/mine   # another job, another run folder

The point whose distances to all updates have the smallest sum stays near most of them when some are far off
(Pillutla et al. 2022, arXiv:1912.13445). It is found by averaging with weights 1 / distance, some times over.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fedtune

QUICKSTART = Path(__file__).parents[1] / "simulations" / "quickstart" / "job.toml"
TURNS = 8
NEAR = 1e-6  # a distance below it counts as this, so that no weight is infinite


def geometric_median(
    updates: Sequence[fedtune.Update], model: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """All clients have to train the same tensors."""
    names = list(updates[0].arrays)
    points = np.stack([np.concatenate([u.arrays[name].ravel() for name in names]) for u in updates])
    shares = np.array([u.weight for u in updates])
    shares = shares / shares.sum()
    middle = shares @ points
    for _ in range(TURNS):
        weights = shares / np.maximum(np.linalg.norm(points - middle, axis=1), NEAR)
        middle = weights @ points / weights.sum()
    ends = np.cumsum([model[name].size for name in names])[:-1]
    return {name: part.reshape(model[name].shape) for name, part in zip(names, np.split(middle, ends))}


def main(job: str = str(QUICKSTART), out: str = "runs/geometric-median") -> None:
    run = fedtune.simulate(
        job,
        out=out,
        aggregation=geometric_median,
        on_round=lambda line: print(f"round {line['round']}: accuracy {line['accuracy']:.3f}"),
    )
    texts = ["what a lovely day", "the worst hour of my life"]
    for text, label in zip(texts, run.predict(texts)):
        print(f"{label}: {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
