"""From a job to the things a simulation works with: base, data, split, encoder, spec."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fedtune import packages
from fedtune.adapters import methods
from fedtune.adapters.kinds.table import METHODS
from fedtune.adapters.spec import AdapterSpec
from fedtune.algorithms.units import AS_THE_JOB, Limits, require_budgets, spec_of
from fedtune.bundles.bundle import Bundle, open_bundle, write_bundle
from fedtune.bundles.subspace import travelling
from fedtune.data import holdings
from fedtune.data.clients import ClientStore
from fedtune.data.examples import Dataset, load_dataset
from fedtune.data.partition import Split, split
from fedtune.errors import DataError, ModelError, RunError, UserError
from fedtune.job import Job
from fedtune.models.base import TunableModel, block_weights, layout
from fedtune.models.layout import Linear
from fedtune.models.load import Encoder, load_encoder, load_model, sketch_model
from fedtune.models.sources import Source, check_hash, locate
from fedtune.privacy.plan import plan_of, resolved, warnings_of
from fedtune.report.summary import few
from fedtune.round.gradient_init import init_warnings
from fedtune.runs.folder import Facts, RunFolder, versions
from fedtune.tasks import Task, task_named
from fedtune.training.memory import step_memory
from fedtune.types import Arrays
from fedtune.wire import Schema
from fedtune.workflows.budgets import fitted, mean_examples


@dataclass(frozen=True)
class OpenBase:
    """A job with its base found and checked, and the labels. `fresh_model` loads another copy of the base."""

    job: Job
    source: Source
    sha256: str
    labels: tuple[str, ...]

    @property
    def classes(self) -> int:
        return max(1, len(self.labels))

    @property
    def task(self) -> Task:
        return task_named(self.job.model.task)

    @cached_property
    def encoder(self) -> Encoder:
        return load_encoder(self.job.model, self.source)

    @cached_property
    def spec(self) -> AdapterSpec:
        return spec_of(layout(sketch_model(self.job.model, self.source, self.classes)), self.job)

    @property
    def schema(self) -> Schema:
        """What models and updates hold."""
        return travelling(self.job, self.spec)

    def step_memory(self, limits: Limits = AS_THE_JOB) -> int | None:
        """Bytes that a training client of these limits needs; None for a base of which
        that cannot be computed.
        """
        if limits not in self._memory:
            sketch = sketch_model(self.job.model, self.source, self.classes)
            self._memory[limits] = step_memory(self.job, self.spec, sketch, limits)["total"]
        return self._memory[limits]

    @cached_property
    def _memory(self) -> dict[Limits, int | None]:
        return {}

    def fresh_model(self) -> TunableModel:
        return load_model(self.job.model, self.source, self.classes, self.job.federation.seed)


@dataclass(frozen=True)
class Setup(OpenBase):
    """A job for a simulation, opened: the base, and everybody's data.

    Nothing has been trained or written yet.
    """

    dataset: Dataset
    split: Split

    @cached_property
    def store(self) -> ClientStore:
        return ClientStore(self.dataset, self.split, self.encoder)


def open_base(job: Job) -> OpenBase:
    """Finds and checks the base.

    The labels are the job's, else those of its data, which must then be here. Raises UserErrors of one line.
    """
    source = locate(job.model.source)
    sha256 = check_hash(source, job.model.sha256) if source.weights else ""
    labels = job.data.labels
    if not labels and task_named(job.model.task).has_head:
        try:
            labels = load_dataset(job.data, job.model, job.federation.seed).label_names
        except UserError as e:
            raise DataError(
                "data.labels = []: name the labels in the job, in order, as its data cannot "
                f"be read here for them ({e})"
            ) from None
    return OpenBase(job, source, sha256, labels)


def open_setup(job: Job) -> Setup:
    """Finds and checks the base, reads and splits the data. Raises UserErrors of one line."""
    source = locate(job.model.source)
    sha256 = check_hash(source, job.model.sha256) if source.weights else ""
    dataset = load_dataset(job.data, job.model, job.federation.seed)
    parts = split(dataset.examples, job.data, job.federation.seed)
    if not len(parts.held_out.rows):
        raise DataError(
            f"data.clients = {job.data.clients}: each client holds a single row or group, "
            "so nothing is left to evaluate on; lower it or give more data"
        )
    setup = Setup(job, source, sha256, dataset.label_names, dataset, parts)
    return (
        replace(setup, job=fitted(job, setup.schema, setup.step_memory, mean_examples(parts, job.federation)))
        if job.units.fit
        else setup
    )


def with_noise(setup: Setup, note: Callable[[str], None]) -> Setup:
    """The same with the noise of its privacy computed.

    Raises PrivacyRefused for a job that would claim more than it gives.
    """
    population = len(setup.split.clients)
    job = resolved(setup.job, population)
    if plan := plan_of(job, population):
        for text in (*warnings_of(plan), *init_warnings(setup.spec, plan)):
            note(text)
    return replace(setup, job=job)


def make_bundle(setup: OpenBase, folder: Path, frame: Arrays, model: TunableModel, start: Arrays) -> Bundle:
    """Writes a bundle; `start` holds what of the model of round 0 is not drawn or taken from the base."""
    score = setup.job.units.chosen.score
    weights = block_weights(model) if score and score.relative else {}
    kind, _, name = setup.job.model.source.partition(":")
    licence = packages.lookup(name).licence if kind == "package" else ""
    return write_bundle(
        folder,
        setup.job,
        frame,
        methods.initial(model, setup.spec, start, setup.job.federation.seed),
        source=setup.job.model.source,
        sha256=setup.sha256,
        licence=licence,
        parameters=layout(model).size,
        task=setup.job.model.task,
        labels=setup.labels,
        spec=setup.spec,
        versions=versions(),
        weights=weights,
    )


def data_free_frame(setup: OpenBase, model: TunableModel) -> Arrays:
    """The frame of init "weights" or "random"; empty for methods without one."""
    job = setup.job

    def weight(linear: Linear) -> np.ndarray:
        return model.linear(linear.name).weight.detach().numpy()

    frame = METHODS[job.adapter.method].frame
    return frame(setup.spec, job.adapter.init, job.federation.seed, weight)


def run_facts(setup: Setup, own: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """What run.json keeps: when and with what the run began, the hashes of base and data,
    and who holds how much of what.

    Of many clients only some are listed, with figures of all beside them.
    own: names of objects that Python passed in place of the job's.
    """
    clients, data = len(setup.split.clients), data_digest(setup)
    listed = few(clients)
    population = (
        {"population": holdings.population(setup.split, setup.dataset) | {"sha256": data}}
        if len(listed) < clients
        else {}
    )
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "sha256": setup.sha256,
        "split": holdings.describe(setup.split, setup.dataset, listed),
        "split_sha256": data,
        **population,
        **({"own": dict(own)} if own else {}),
    }


def data_digest(setup: Setup) -> str:
    return holdings.digest(setup.split, setup.dataset, inputs=not setup.task.inputs.in_folder)


def require_unchanged(setup: Setup, run: RunFolder, own: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raises RunError when job, base, data or what is trained are no longer those the run began with:
    going on would mix two runs.
    """
    run.require_own_job()
    began = run.facts()
    require_same_objects(run, own)
    if began["sha256"] != setup.sha256:
        raise RunError(
            f"{run.path}: began with a base of sha256 {began['sha256'][:12]}…, {setup.job.model.source} now "
            f"has {setup.sha256[:12]}…; restore that base or begin a new run"
        )
    if (run.bundle / "manifest.json").exists() and open_bundle(run.bundle).manifest.spec != setup.spec:
        raise RunError(
            f"{run.path}: was begun with fedtune "
            f"{began['versions'].get('fedtune', 'of an unknown version')}, which trained other "
            f"tensors of this base than this one ({versions()['fedtune']}) makes of its job; "
            "continue it with that version or begin a new run"
        )
    if not same_data(setup, began):
        raise RunError(
            f"{run.path}: {setup.job.data.source} no longer holds what it held when the run began; "
            "restore it or begin a new run"
        )


def require_same_objects(run: RunFolder, own: Mapping[str, str]) -> None:
    """Raises RunError unless the run began with objects from Python of these names."""
    if (used := run.facts().get("own", {})) != dict(own):
        named, given = (", ".join(f"{k} = {v}" for k, v in its.items()) or "none" for its in (used, own))
        raise RunError(
            f"{run.path}: began with objects passed from Python ({named}), now there are {given}; "
            "continue it with fedtune.simulate and the same objects, or begin a new run"
        )


def same_data(setup: Setup, began: Facts) -> bool:
    """By digest; a run of an older version has only the list of what each client held."""
    if "split_sha256" in began:
        return began["split_sha256"] == data_digest(setup)
    return began["split"] == holdings.describe(setup.split, setup.dataset)


def require_trainable(setup: OpenBase) -> None:
    """Raises ModelError early for a base whose weights are not there,
    JobError for one with fewer blocks than a budget.
    """
    if not setup.source.weights:
        raise ModelError(
            f"model.source = {setup.job.model.source!r}: no .safetensors weights in {setup.source.folder}; "
            "`fedtune plan` works without them, training does not"
        )
    require_budgets(setup.job, setup.schema)
