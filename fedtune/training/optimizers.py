"""Optimizers over many models at once: row k of every [K, P] array is one model.

Plain functions on plain tensors, in place.

The formulas and their order of operations are those of torch.optim (tests compare), so that a cohort trained
together ends where clients trained one by one end.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fedtune.job import FederationSection
from fedtune.round.rates import BETA1, BETA2, EPS


@dataclass
class Moments:
    """What an optimizer keeps between steps: none, one or two arrays like the models."""

    first: Tensor | None = None
    second: Tensor | None = None


def start(models: Tensor, settings: FederationSection) -> Moments:
    """State before step 1."""
    if settings.optimizer == "sgd":
        return Moments(torch.zeros_like(models) if settings.momentum else None)
    return Moments(torch.zeros_like(models), torch.zeros_like(models))


def update(
    models: Tensor,
    gradients: Tensor,
    moments: Moments,
    rates: Tensor | float,
    count: int,
    settings: FederationSection,
) -> None:
    """Step `count` (from 1) of the first len(models) rows. `gradients` is overwritten.

    Args:
        models, gradients: [K, P].
        rates: learning rates, broadcast against [K, P]; one number where all are the same, which is faster.
    """
    k = len(models)
    if settings.optimizer == "sgd":
        _sgd(models, gradients, None if moments.first is None else moments.first[:k], rates, count, settings)
    else:
        assert moments.first is not None and moments.second is not None
        first, second = moments.first[:k], moments.second[:k]
        if isinstance(rates, float):
            _adamw_in_one_pass(models, gradients, first, second, rates, count, settings)
        else:
            _adamw(models, gradients, first, second, rates, count, settings)


def _sgd(
    models: Tensor,
    g: Tensor,
    momentum: Tensor | None,
    rates: Tensor | float,
    count: int,
    settings: FederationSection,
) -> None:
    if settings.weight_decay:
        g.add_(models, alpha=settings.weight_decay)
    if momentum is not None:
        g = momentum.copy_(g) if count == 1 else momentum.mul_(settings.momentum).add_(g)
    if isinstance(rates, float):
        models.sub_(g, alpha=rates)
    else:
        models.addcmul_(g, rates.expand_as(g), value=-1)


def _adamw(
    models: Tensor,
    g: Tensor,
    first: Tensor,
    second: Tensor,
    rates: Tensor,
    count: int,
    settings: FederationSection,
) -> None:
    """Loshchilov and Hutter 2019, arXiv:1711.05101, Algorithm 2, with a schedule of 1."""
    if settings.weight_decay:
        models.mul_(1 - rates * settings.weight_decay)
    first.lerp_(g, 1 - BETA1)
    second.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
    denominator = torch.sqrt(second, out=g).div_(math.sqrt(1 - BETA2**count)).add_(EPS)
    models.addcdiv_((first * rates), denominator, value=-1 / (1 - BETA1**count))


def _adamw_in_one_pass(
    models: Tensor,
    g: Tensor,
    first: Tensor,
    second: Tensor,
    rate: float,
    count: int,
    settings: FederationSection,
) -> None:
    """The same with one learning rate for all numbers: each is read once."""
    step = torch.full((), count - 1.0, device=models.device)
    adamw(
        [models],
        [g],
        [first],
        [second],
        [],
        [step],
        fused=True,
        amsgrad=False,
        beta1=BETA1,
        beta2=BETA2,
        lr=rate,
        weight_decay=settings.weight_decay,
        eps=EPS,
        maximize=False,
    )
