"""From a job's section and a base to the spec of what is trained."""

from fedtune.adapters.kinds.table import METHODS
from fedtune.adapters.spec import AdapterSpec
from fedtune.errors import ModelError
from fedtune.job import AdapterSection
from fedtune.models.layout import Layout


def describe(layout: Layout, section: AdapterSection) -> AdapterSpec:
    """The spec of the job's method on this base.

    Raises:
        ModelError: the base has nothing this method can train, or a target names no linear of it.
    """
    method = METHODS[section.method]
    linears, trainable, frame = method.tensors(layout, section.targets, section.rank)
    head = layout.head if section.train_head or method.head_only else ()
    if not trainable + head:
        raise ModelError(
            f"adapter.method = {section.method!r}: this base has nothing it can train; use another method"
        )
    scale = section.alpha / section.rank if section.alpha else 1.0
    return AdapterSpec(section.method, section.rank, scale, linears, (*trainable, *head), frame)
