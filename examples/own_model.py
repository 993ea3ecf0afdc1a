"""A model and data of one's own: a small network on handwritten digits,
held by 12 desks that each know few of them.

python examples/own_model.py [OUT]
"""

import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fedtune


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Network(nn.Sequential):
    """[n, 64] pixels -> [n, 10] logits. fedtune finds head, blocks and linears by itself."""

    def __init__(self, width: int = 32) -> None:
        blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        super().__init__(nn.Linear(64, width), blocks, nn.Linear(width, 10))


def by_desk(desks: int = 12) -> dict[str, list[tuple[np.ndarray, int]]]:
    """Every second desk has a bit of all digits, the others mostly one or two."""
    digits = load_digits()
    order = np.argsort(digits.target, kind="stable")
    pairs = [(digits.data[i].astype(np.float32) / 16, int(digits.target[i])) for i in order]
    return {
        f"desk-{k:02d}": pairs[k::desks] if k % 2 else pairs[140 * k : 140 * (k + 1)] for k in range(desks)
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    job = {
        "adapter": {"method": "full"},
        "federation": {"rounds": 8, "cohort": 6, "lr": 0.003, "local-epochs": 3},
    }
    out = sys.argv[1] if len(sys.argv) > 1 else "runs/own-model"
    run = fedtune.simulate(job, out=out, model=Network(), data=by_desk())
    first, last = run.rounds[0], run.rounds[-1]
    print(f"accuracy {first['accuracy']:.3f} -> {last['accuracy']:.3f}, {last['total_bytes']:,} bytes")
    print("the digit in place 9 is read as", run.predict([load_digits().data[9].astype(np.float32) / 16])[0])
