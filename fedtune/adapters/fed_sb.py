"""Fed-SB: y = W x + s·B·R·A·x with only the core R [r, r] trained; A [r, inputs] and B [outputs, r] are a frozen frame.

Sources: Fed-SB (Singhal et al. 2025), LoRA-SB and LoRA-XS; the maths is in the first two functions' docstrings.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SBLinear(nn.Module):
    """A frozen linear with a core beside it. Input [..., inputs], output [..., outputs].

    The core is a plain bias-free nn.Linear, so that per-example gradient tools see a layer they know.
    """

    a: Tensor
    b: Tensor

    def __init__(self, base: nn.Linear, a: np.ndarray, b: np.ndarray, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.register_buffer("a", torch.from_numpy(np.array(a, np.float32)))
        self.register_buffer("b", torch.from_numpy(np.array(b, np.float32) * np.float32(scale)))
        self.core = nn.Linear(a.shape[0], a.shape[0], bias=False)
        nn.init.zeros_(self.core.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(self.core(F.linear(x, self.a)), self.b)
