"""What the coordinator makes of a round's mean: instead of becoming the model, it gives the direction of a
step (Reddi et al. 2021, arXiv:2003.00295). STEPS names those that a job can choose.

    Delta = mean - model
    average   model <- mean
    fedavgm   m <- beta m + Delta;   model <- model + eta m
              (Hsu et al. 2019, arXiv:1909.06335, section 4.3)
    fedadam   m <- beta m + (1 - beta) Delta;   v <- beta2 v + (1 - beta2) Delta^2;
              model <- model + eta m / (sqrt(v) + tau)
              (Reddi et al., Algorithm 2; no bias correction)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Change = Callable[[np.ndarray, np.ndarray, np.ndarray, Any], tuple[np.ndarray, ...]]
"""(Delta, first moment, second moment, federation section) -> what the learning rate multiplies, and then
the moments that are kept, the first first.
"""


@dataclass(frozen=True)
class Step:
    """One server optimizer.

    Attributes:
        name: in federation.server-optimizer.
        change: None where the mean becomes the model.
        keys: of the federation section, which no optimizer without them uses.
    """

    name: str
    change: Change | None
    keys: tuple[str, ...] = ()


def _fedavgm(
    delta: np.ndarray, first: np.ndarray, second: np.ndarray, settings: Any
) -> tuple[np.ndarray, ...]:
    first = settings.server_momentum * first + delta
    return first, first


def _fedadam(
    delta: np.ndarray, first: np.ndarray, second: np.ndarray, settings: Any
) -> tuple[np.ndarray, ...]:
    first = settings.server_momentum * first + (1 - settings.server_momentum) * delta
    second = settings.server_beta2 * second + (1 - settings.server_beta2) * delta**2
    return first / (np.sqrt(second) + settings.server_tau), first, second


AVERAGE = Step("average", None)
STEPS = {
    step.name: step
    for step in (
        AVERAGE,
        Step("fedavgm", _fedavgm, ("server_lr", "server_momentum")),
        Step("fedadam", _fedadam, ("server_lr", "server_momentum", "server_beta2", "server_tau")),
    )
}
