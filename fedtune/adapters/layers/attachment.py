"""The torch half of an adapter method: how it is put on a model, and the twins of its own modules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fedtune.adapters.layers.stacked import Twin
from fedtune.adapters.spec import AdapterSpec
from fedtune.models.base import TunableModel
from fedtune.types import Arrays


def nothing(model: TunableModel) -> None:
    """What most methods leave beside a merged base."""


@dataclass(frozen=True)
class Attachment:
    """An adapter method on a model.

    Args:
        attach: changes a frozen model in place; returns parameters by name, all that are trained among them.
        insert: puts into a model, in place, what stays beside the base after merging.
        stacked: the stacked twins of modules of its own, by type.
        lean: forward passes of modules of its own that keep less for the backward pass, by type.
    """

    attach: Callable[[TunableModel, AdapterSpec, Arrays], Mapping[str, Tensor]]
    insert: Callable[[TunableModel], None] = nothing
    stacked: Mapping[type[nn.Module], Twin] = field(default_factory=dict)
    lean: Mapping[type[nn.Module], Callable[[Any, Tensor], Tensor]] = field(default_factory=dict)


def replace_linear(model: TunableModel, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.body.get_submodule(parent), child, new)
