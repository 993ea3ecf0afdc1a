"""Epsilon of a history, by dp-accounting's PLD and RDP accountants and,
where it is installed, Opacus' PRV.
"""

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fedtune.privacy.releases import History, Release, Step, history

if TYPE_CHECKING:  # the accountants take a second to import, and most commands read no epsilon
    from dp_accounting import DpEvent

INTERVAL = 1e-3
"""Of PLD's grid.

Its estimate is pessimistic, so a coarser one is larger, never wrong; 1e-4 differs in the fourth digit and
takes ten times as long.
"""
CELLS = 4e6
"""About the most cells of that grid: with so little noise that it would have more, it is made coarser,
or memory would run out.
"""
LARGEST = 1e4
"""Above it an epsilon says nothing, and is read as infinite."""
ACCOUNTANTS = ("pld", "rdp", "prv")


@dataclass(frozen=True)
class Reading:
    """`epsilon` by each accountant that can read the history (all are upper bounds), and by the one that
    is quoted, the smallest.
    """

    by: tuple[tuple[str, float], ...]

    @property
    def best(self) -> str:
        return min(self.by, key=lambda x: x[1], default=("none", math.inf))[0]

    @property
    def epsilon(self) -> float:
        return min((e for _, e in self.by), default=math.inf)


def relation(steps: Sequence[Step]) -> str:
    """How neighbouring data sets differ: "replace-one" where a fixed number was drawn, as its size stays;
    else "add-or-remove-one".
    """
    return "replace-one" if any(s.sampling == "fixed" for s in steps) else "add-or-remove-one"


def read_epsilon(
    found: History | Sequence[Release], delta: float, accountants: Sequence[str] = ("pld", "rdp")
) -> Reading:
    """Epsilon at `delta` of all that happened; infinite where anything was not protected."""
    if found and isinstance(found[0], Release):
        if not all(r.protected for r in found):  # type: ignore[union-attr]
            return Reading((("unprotected", math.inf),))
        found = history(found)  # type: ignore[arg-type]
    return _read(tuple(found), delta, tuple(accountants))  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _read(found: History, delta: float, accountants: tuple[str, ...]) -> Reading:
    if not found:
        return Reading((("none", 0.0),))
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}: must lie between 0 and 1")
    values = []
    for name in accountants:
        value = _READERS[name](found, delta)
        if value is not None:
            values.append((name, value if value <= LARGEST else math.inf))
    return Reading(tuple(values))


def _rdp(found: History, delta: float) -> float | None:
    """RDP accounts for a fixed number drawn with noise over the sensitivity, which is twice the clip when one
    unit replaces another: it is given half of the multiplier, which is over the clip.
    """
    from dp_accounting import NeighboringRelation, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    replace = relation([s for s, _ in found]) == "replace-one"
    accountant = RdpAccountant(
        neighboring_relation=NeighboringRelation.REPLACE_ONE
        if replace
        else NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    with _quiet():
        for step, count in found:
            event = _rdp_event(step, replace)
            if event is None:
                return None
            accountant.compose(SelfComposedDpEvent(event, count))
        return float(accountant.get_epsilon(delta))


def _rdp_event(step: Step, replace: bool) -> "DpEvent | None":
    from dp_accounting import (
        GaussianDpEvent,
        PoissonSampledDpEvent,
        SampledWithoutReplacementDpEvent,
        ZCDpEvent,
    )

    z = step.multiplier / 2 if replace else step.multiplier
    if step.excess:
        return None if step.sampling != "none" else ZCDpEvent((1 / z + step.excess) ** 2 / 2)
    if step.sampling == "poisson":
        return None if replace else PoissonSampledDpEvent(step.rate, GaussianDpEvent(z))
    return (
        SampledWithoutReplacementDpEvent(step.population, step.sample, GaussianDpEvent(z))
        if step.sampling == "fixed"
        else GaussianDpEvent(z)
    )


def _pld(found: History, delta: float) -> float | None:
    """PLD itself doubles the sensitivity for replace-one, and has no reading for a fixed number drawn."""
    if any(s.sampling == "fixed" or s.excess for s, _ in found):
        return None
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    bound = _read(found, delta, ("rdp",)).epsilon
    if bound > LARGEST:
        return None
    reach = 4 * bound + max(1 / (2 * step.multiplier**2) + 8 / step.multiplier for step, _ in found)
    accountant = PLDAccountant(value_discretization_interval=max(INTERVAL, reach / CELLS))
    for step, count in found:
        plain = GaussianDpEvent(step.multiplier)
        accountant.compose(
            SelfComposedDpEvent(
                PoissonSampledDpEvent(step.rate, plain) if step.sampling == "poisson" else plain, count
            )
        )
    return float(accountant.get_epsilon(delta))


def _prv(found: History, delta: float) -> float | None:
    """Opacus' upper bound; for Gaussian noise with Poisson sampling or none."""
    if any(s.sampling == "fixed" or s.excess for s, _ in found) or importlib.util.find_spec("opacus") is None:
        return None
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [
        (s.multiplier, s.rate if s.sampling == "poisson" else 1.0, count) for s, count in found
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return float(accountant.get_epsilon(delta))
        except (RuntimeError, ValueError, OverflowError):  # its grid does not reach such an epsilon
            return None


_READERS: dict[str, Callable[[History, float], float | None]] = {"pld": _pld, "rdp": _rdp, "prv": _prv}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences absl's warning about orders that RDP leaves out:
    leaving some out can only make the bound larger.
    """
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
