"""Bias, full and head: parameters of the base, with nothing beside it."""

from collections.abc import Mapping

from torch import Tensor

from fedtune.adapters.layers.attachment import Attachment
from fedtune.adapters.spec import AdapterSpec
from fedtune.models.base import TunableModel
from fedtune.types import Arrays


def _attach(model: TunableModel, spec: AdapterSpec, frame: Arrays) -> Mapping[str, Tensor]:
    return dict(model.body.named_parameters())


ATTACHMENT = Attachment(_attach)
