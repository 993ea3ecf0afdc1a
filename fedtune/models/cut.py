"""A base in two parts: what lies below a unit, whose output never changes while only higher units
are trained, and the rest.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fedtune.models.base import block_list


class Cut:
    """The cut just below `unit` ("block.3") of a body. Raises ValueError when it has no such block."""

    def __init__(self, body: nn.Module, unit: str) -> None:
        blocks = block_units(body)
        if unit not in blocks:
            raise ValueError(f"{unit!r} is no block of this base")
        path, _, self._child = block_list(body).rpartition(".")
        self._parent, self._place = body.get_submodule(path), blocks.index(unit)
        self._stop, self._start = _Stop(), _Start()

    def below(self, run: Callable[[], Any]) -> Tensor:
        """What reaches the cut when `run` runs the body, which ends there."""
        with self._blocks_are([*self._blocks()[: self._place], self._stop]):
            try:
                run()
            except _Reached as found:
                return found.hidden
        raise RuntimeError("the body ran without its blocks")

    def above(self, hidden: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """What `run` returns when the body's blocks begin at the cut, with `hidden`."""
        self._start.hidden = hidden
        try:
            with self._blocks_are([self._start, *self._blocks()[self._place :]]):
                return run()
        finally:
            self._start.hidden = None

    def _blocks(self) -> list[nn.Module]:
        # as they are now: some may be stacked
        return [m for m in self._parent._modules[self._child].children()]  # type: ignore[union-attr]

    @contextmanager
    def _blocks_are(self, blocks: list[nn.Module]) -> Iterator[None]:
        before = self._parent._modules[self._child]
        self._parent._modules[self._child] = (
            nn.Sequential(*blocks) if isinstance(before, nn.Sequential) else nn.ModuleList(blocks)
        )
        try:
            yield
        finally:
            self._parent._modules[self._child] = before


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Stop(nn.Module):
    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached(hidden)


class _Start(nn.Module):
    hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.hidden is not None
        return self.hidden


def block_units(body: nn.Module) -> list[str]:
    """Unit names of the blocks, from the bottom up; [] for a body without."""
    name = block_list(body)
    return [f"block.{child}" for child, _ in body.get_submodule(name).named_children()] if name else []


def lowest_unit(body: nn.Module, trained: Collection[str]) -> str | None:
    """The unit below which nothing is trained: a block, or "head".

    None where that saves nothing or is not known: the first block, or "outside".
    """
    blocks = block_units(body)
    if not trained or not set(trained) <= {*blocks, "head"}:
        return None
    first = next((unit for unit in blocks if unit in trained), "head")
    return None if blocks and first == blocks[0] else first
