"""What a stacked twin is made of: rows by the model they are of, and the values of all models.

A twin stands in for a layer while many models are trained over one base (`training.stacked`).
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Rows:
    """Which model each of n rows belongs to: `owner` int64 [n], values below `models`."""

    def __init__(self, owner: np.ndarray, models: int, device: torch.device) -> None:
        counts = np.bincount(owner, minlength=models)
        self.models, self.width, self.device, self._owner = models, int(counts.max(initial=1)), device, owner
        order = np.argsort(owner, kind="stable")
        starts = np.cumsum(counts) - counts
        slot = np.empty(len(owner), np.int64)
        slot[order] = owner[order] * self.width + np.arange(len(owner)) - starts[owner[order]]
        self._dense = len(owner) == models * self.width and bool((slot == np.arange(len(owner))).all())
        self._slot = torch.from_numpy(slot).to(device)

    def gather(self, x: Tensor) -> Tensor:
        """[n, ...] -> [models, width, ...], the rows of each model together;
        zeros where a model has fewer.
        """
        if self._dense:
            return x.reshape(self.models, self.width, *x.shape[1:])
        out = x.new_zeros(self.models * self.width, *x.shape[1:])
        return out.index_copy(0, self._slot, x).view(self.models, self.width, *x.shape[1:])

    def scatter(self, x: Tensor) -> Tensor:
        """[models, width, ...] -> [n, ...]: the reverse."""
        flat = x.reshape(self.models * self.width, *x.shape[2:])
        return flat if self._dense else flat.index_select(0, self._slot)

    @cached_property
    def owner(self) -> Tensor:
        return torch.from_numpy(self._owner).to(self.device)

    @cached_property
    def belongs(self) -> Tensor:
        """float32 [n, models]: 1 where the row is the model's. Spreading and summing are products with it."""
        return F.one_hot(self.owner, self.models).float()


@dataclass
class Examples:
    """The examples that run now: `owner` [n] is the model of each, `lengths` [n] the rows each has in
    the layers of a packed row.
    """

    owner: np.ndarray
    models: int
    lengths: np.ndarray | None
    device: torch.device
    _rows: dict[tuple[int, ...], Rows] = field(default_factory=dict)

    def rows(self, *shape: int) -> Rows:
        """For a layer whose input has these dimensions before the features': [n], [n, ...] (padded), or
        packed tokens ([1, tokens]).
        """
        if shape not in self._rows:
            self._rows[shape] = Rows(self._owners(shape), self.models, self.device)
        return self._rows[shape]

    def _owners(self, shape: tuple[int, ...]) -> np.ndarray:
        n = len(self.owner)
        if self.lengths is not None:
            if shape in ((1, tokens := int(self.lengths.sum())), (tokens,)):
                return np.repeat(self.owner, self.lengths)
            if shape == (1,):  # a pooler that sees the row's first token, and whose result nobody reads
                return np.zeros(1, np.int64)
        if shape[0] != n or (self.lengths is not None and shape != (n,)):
            raise NotStackable(f"a layer mixes examples: it sees {shape} where there are {n}")
        return np.repeat(self.owner, math.prod(shape[1:]))


class NotStackable(Exception):
    """A trained tensor lies in a layer that has no stacked twin, or one that does not keep examples apart."""


class Stacked(nn.Module):
    """Keeps the plain layer it stands for, the values of all models by local name ([K, *shape]),
    and the examples that run now.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self._plain = (plain,)  # not a child: its parameters are not this module's
        self.values: dict[str, Tensor] = {}
        self.now: Examples | None = None

    def rows(self, *shape: int) -> Rows:
        assert self.now is not None
        return self.now.rows(*shape)

    @property
    def plain(self) -> Any:
        return self._plain[0]

    def get(self, name: str) -> Tensor | None:
        """The stacked values where they are trained, else None."""
        return self.values.get(name)


Twin = tuple[type[Stacked], frozenset[str]]
"""A stacked layer, and the local names of what it can hold for each model."""
