"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + s·B·A·x, both factors trained.

Averaged factor by factor across clients this is FedIT, which is not exact: mean(B)·mean(A) is not mean(B·A).
"""

from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A frozen linear with trained factors A [r, inputs] (`down`) and B [outputs, r] (`up`)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))
