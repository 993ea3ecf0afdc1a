"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + s·B·A·x, both factors trained.

Averaged factor by factor across clients this is FedIT, which is not exact: mean(B)·mean(A) is not mean(B·A).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedtune.adapters.layers.attachment import Attachment, replace_linear
from fedtune.adapters.layers.stacked import Stacked
from fedtune.adapters.spec import AdapterSpec
from fedtune.models.base import TunableModel
from fedtune.types import Arrays


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


class StackedLoRA(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        plain: LoRALinear = self.plain
        flat = x.reshape(-1, x.shape[-1])
        rows = self.rows(*x.shape[:-1])
        up, down = self.values["up.weight"], self.get("down.weight")
        thin = (
            rows.gather(flat @ plain.down.weight.T)
            if down is None
            else rows.gather(flat) @ down.transpose(1, 2)
        )
        delta = rows.scatter(thin @ up.transpose(1, 2))
        return plain.base(x) + plain.scale * delta.view(*x.shape[:-1], -1)


def _attach(model: TunableModel, spec: AdapterSpec, frame: Arrays) -> Mapping[str, Tensor]:
    parameters: dict[str, Tensor] = {}
    for linear in spec.linears:
        new = LoRALinear(model.linear(linear.name), spec.rank, spec.scale)
        replace_linear(model, linear.name, new)
        parameters |= {f"{linear.name}.A": new.down.weight, f"{linear.name}.B": new.up.weight}
        if f"{linear.name}.A" in frame:  # FFA-LoRA: it stays
            new.down.weight.requires_grad_(False).copy_(torch.from_numpy(frame[f"{linear.name}.A"]))
    return parameters


ATTACHMENT = Attachment(_attach, stacked={LoRALinear: (StackedLoRA, frozenset({"up.weight", "down.weight"}))})
