"""A model and data of one's own: a small residual network on handwritten digits, held by 12 clients that each know few of them.

python examples/own_model.py [FOLDER]
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fedtune


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Network(nn.Module):
    """[n, 64] pixels -> [n, 10] logits. fedtune finds the head, the blocks and their linears by itself."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(3)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def by_client(clients: int = 12) -> dict[str, list[tuple[np.ndarray, int]]]:
    """Digits sorted by label and cut into pieces: client 0 has mostly zeros, and so on."""
    digits = load_digits()
    order = np.argsort(digits.target, kind="stable")
    pairs = [(digits.data[i].astype(np.float32) / 16, int(digits.target[i])) for i in order]
    return {
        f"desk-{k:02d}": pairs[k::clients] if k % 2 else pairs[k * 90 : k * 90 + 140] for k in range(clients)
    }


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-model")
    job = {
        "adapter": {"method": "full"},
        "federation": {"rounds": 8, "cohort": 6, "lr": 0.003, "local-epochs": 3},
    }
    run = fedtune.simulate(job, out=out, model=Network(), data=by_client())
    print(
        f"accuracy {run.rounds[0]['accuracy']:.3f} -> {run.rounds[-1]['accuracy']:.3f}; {run.rounds[-1]['total_bytes']:,} bytes"
    )
    print(
        "a nine is read as",
        run.predict([load_digits().data[9].astype(np.float32) / 16])[0],
        "- the page:",
        run.report(),
    )
