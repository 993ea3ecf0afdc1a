"""A simulation's setup with a module or data that Python passed, in place of what the job names."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from fedtune.adapters.spec import AdapterSpec
from fedtune.algorithms.units import AS_THE_JOB, Limits, spec_of
from fedtune.data import own as data_own
from fedtune.data.encoded import Encoder
from fedtune.data.examples import OWN
from fedtune.errors import DataError, UserError
from fedtune.job import DataSection, Job, ModelSection, toml_value
from fedtune.models import own as models_own
from fedtune.models.base import TunableModel, layout
from fedtune.models.load import load_encoder
from fedtune.models.sources import Source, check_hash, locate
from fedtune.tasks import task_named
from fedtune.tasks.images import IMAGE_CLASSIFICATION
from fedtune.workflows.setup import Setup

_READ = {"data": ("source", "labels", "held_out"), "model": ("source", "task")}


@dataclass(frozen=True)
class OwnSetup(Setup):
    """A setup with data of the caller's own. prototype: their module as a base; None: the base is the job's.
    arrays: the encoder of their data; None for texts, which the base's encoder takes.
    """

    prototype: TunableModel | None
    arrays: data_own.ArrayEncoder | None

    @cached_property
    def encoder(self) -> Encoder:
        return load_encoder(self.job.model, self.source) if self.arrays is None else self.arrays

    @cached_property
    def spec(self) -> AdapterSpec:
        return super().spec if self.prototype is None else spec_of(layout(self.prototype), self.job)

    def step_memory(self, limits: Limits = AS_THE_JOB) -> int | None:
        return super().step_memory(limits) if self.prototype is None else None

    def fresh_model(self) -> TunableModel:
        return super().fresh_model() if self.prototype is None else copy.deepcopy(self.prototype)


def open_own(job: Job, module: nn.Module | None, data: Any) -> OwnSetup:
    """Checks module and data against each other. Raises UserErrors of one line, also for a key of the job
    that is not read where they are given and was changed.
    """
    if data is None:
        raise UserError(
            "data: a module of one's own needs data of one's own; give data = {client: [(array, label), …]}"
        )
    if job.units.fit:
        raise UserError(
            "units.fit = true: budgets are not fitted where data is passed from Python; "
            "give units.budget, or each class of devices its units"
        )
    fed, task = job.federation, task_named(job.model.task)
    _require_unread(job.data, DataSection(), "data", "data")
    dataset, parts, arrays = data_own.read(data, job.data.labels, job.data.held_out, fed.seed)
    if not len(parts.held_out.rows):
        raise DataError(
            "data: each client holds a single example, so nothing is left to evaluate on; "
            "give more, or held-out ones"
        )
    if (module is None) != (arrays is None):
        raise DataError(
            "data: holds texts, a module of one's own takes arrays; give arrays, or leave out the module"
            if arrays is None
            else "data: holds arrays, and the job's base takes texts; give texts, or a module for arrays"
        )
    update: dict[str, Any] = {"data": job.data.model_copy(update={"source": OWN})}
    if module is None or arrays is None:
        if not task.has_head:
            raise UserError(
                f"model.task = {toml_value(task.name)}: data of one's own has labels; "
                'use "text-classification"'
            )
        source = locate(job.model.source)
        sha256, prototype = check_hash(source, job.model.sha256) if source.weights else "", None
    else:
        _require_unread(job.model, ModelSection(), "model", "model")
        if not task.has_head:
            raise UserError(
                f"model.task = {toml_value(task.name)}: a module of one's own gives labels; remove the key"
            )
        name = models_own.SOURCE + type(module).__name__
        two = arrays.collate([arrays.items[0], arrays.items[-1]])[data_own.INPUT]
        prototype = models_own.wrapped(module, IMAGE_CLASSIFICATION, two, len(dataset.label_names))
        sha256, source = models_own.weights_digest(module), Source(name, Path(), (Path(),))
        # arrays are to the engines as images are: of one shape, with one label each
        update["model"] = job.model.model_copy(update={"source": name, "task": IMAGE_CLASSIFICATION.name})
        # a graph's encoder, and PEFT's base, are files, which nobody has of what Python passed
        update["export"] = job.export.model_copy(update={"onnx": False, "peft": False})
    return OwnSetup(
        job.model_copy(update=update), source, sha256, dataset.label_names, dataset, parts, prototype, arrays
    )


def _require_unread(section: Any, default: Any, name: str, given: str) -> None:
    """Raises UserError for a key that was changed and says nothing where `given` was passed."""
    for key in type(section).model_fields:
        value = getattr(section, key)
        own = key == "source" and str(value).startswith("own:")
        reads = key in _READ[name] and (key != "source" or own)
        if value != getattr(default, key) and not reads:
            raise UserError(
                f"{name}.{key.replace('_', '-')} = {toml_value(value)}: is not read where {given} is passed "
                "from Python; remove the key, or the argument"
            )
