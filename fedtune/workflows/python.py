"""The door for Python: one simulation with objects of the caller's own, and an opened run folder.

A job file, a bundle and a message name only what is built in. What is passed here rides beside the job and
never into a file: run.json keeps its names, so that a run is not gone on with without it.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.adapters import methods
from fedtune.aggregation.mean import Mean
from fedtune.aggregation.rules import Rule, own_rule
from fedtune.algorithms.fed_avg import Draw
from fedtune.bundles.bundle import open_bundle
from fedtune.data.encoded import ClientData
from fedtune.data.own import INPUT, ArrayEncoder, OwnData, as_array
from fedtune.errors import RunError, UserError
from fedtune.job import Job, job_from, load_job
from fedtune.models.base import TunableModel
from fedtune.report.summary import is_whole, load_summary
from fedtune.round.watch import Watch
from fedtune.runs.folder import RunFolder
from fedtune.runs.folder import open_run as open_folder
from fedtune.stateful.methods import method_of
from fedtune.training.local import to_batch
from fedtune.types import Arrays, ClientInfo, Update
from fedtune.workflows.export import require_same_base
from fedtune.workflows.own import open_own
from fedtune.workflows.setup import (
    OpenBase,
    Setup,
    open_base,
    open_setup,
    require_unchanged,
    same_data,
    with_noise,
)
from fedtune.workflows.simulation import simulate as run_simulation

JobLike = Job | Mapping[str, Any] | str | Path | None
Aggregate = Rule | Callable[[Sequence[Update], Arrays], Mean | Arrays]
"""A rule, or (updates of a round, model that the round started from) -> the new values
of its tensors, by name.
"""
Select = Callable[[Sequence[ClientInfo], int, np.random.Generator], Sequence[ClientInfo | str]]
"""(clients that can be asked, round from 1 on, generator of the round) -> those that
train in it, or their names.
"""


def simulate(
    job: JobLike = None,
    *,
    out: str | Path,
    model: nn.Module | None = None,
    data: OwnData | None = None,
    aggregation: Aggregate | None = None,
    select: Select | None = None,
    on_round: Callable[[dict[str, Any]], None] | None = None,
    note: Callable[[str], None] = lambda text: print(f"note: {text}", file=sys.stderr),
) -> "Run":
    """Simulates a job to its end, or what is left of it, and gives the run.

    Args:
        job: a job file, a mapping of its sections (`{"federation": {"rounds": 5}}`),
            or a `fedtune.Job`; None: the default job.
        out: the run folder. One that a run of this very job began in is gone on with from
            its last finished round.
        model: a module of one's own, float32, in place of model.source. It takes a batch of arrays [n,
            *shape] as its one argument and gives logits [n, labels] from an `nn.Linear` at its end, the head;
            blocks and linears are found by structure. The module stays as it is. It needs `data` of arrays.
        data: in place of data.source: {client: dataset of (input, label)}, see `fedtune.data.own`;
            with arrays for a module of one's own, with texts for the job's base. Of `[data]`,
            labels and held-out are read.
        aggregation: in place of federation.aggregation. A function is given all updates of a round, each with
            `client`, `arrays` (float32, by name, the values after training and not differences), `weight`
            (examples) and `metrics`, and the model that the round started from; it gives the new values of
            tensors by name, in their shapes, and what it leaves out stays. It does not go with privacy for
            clients or secure aggregation.
        select: in place of federation.sampling. Each client has `name` and `examples`. Not with privacy for
            clients, whose epsilon counts on how they are drawn.
        on_round: called after each round with its line of metrics.jsonl, round 0 first.
        note: told what is worth knowing in one line each.

    Raises:
        UserError (JobError, DataError, ModelError, RunError, PrivacyRefused): one line each, before anything
            is written; of an object that breaks its promise while the run is under way, with the run as it
            was after its last whole round.
    """
    checked = job_of(job)
    rule = None if aggregation is None else _rule(aggregation)
    draw = None if select is None else _draw(select)
    given = {"model": model, "data": data, "aggregation": aggregation, "select": select}
    own = {name: _name(it) for name, it in given.items() if it is not None}
    setup = with_noise(_opened(checked, model, data), note)
    folder = _begun(Path(out), setup.job)
    if folder is not None and is_whole(folder.path):
        require_unchanged(setup, folder, own)
        return Run(folder, setup)
    watch = Watch(line=on_round or (lambda line: None), note=note)
    run = run_simulation(setup.job, folder, Path(out), watch, rule=rule, draw=draw, own=own, setup=setup)
    return Run(run, setup)


def open_run(folder: str | Path, *, model: nn.Module | None = None, data: OwnData | None = None) -> "Run":
    """Opens what `simulate`, or `fedtune simulate`, left. model, data: as the run began with, where it began
    with any; without them the run's figures can be read, but nothing predicted.

    Raises RunError for a folder that is no run, or one that began with another module or other data.
    """
    run = open_folder(Path(folder))
    if model is None and data is None:
        return Run(run)
    setup = _opened(run.job(), model, data)
    if run.facts()["sha256"] != setup.sha256 or not same_data(setup, run.facts()):
        raise RunError(f"{run.path}: began with another module or other data; give those it began with")
    return Run(run, setup)


def _opened(job: Job, model: nn.Module | None, data: OwnData | None) -> Setup:
    return open_setup(job) if model is None and data is None else open_own(job, model, data)


def job_of(job: JobLike) -> Job:
    """A checked job. Raises JobError with all problems, UserError for what is no job."""
    if isinstance(job, Job):
        return job
    if job is None or isinstance(job, str | Path):
        return load_job(None if job is None else Path(job))
    if not isinstance(job, Mapping):
        raise UserError(
            f"job: is a {type(job).__name__}; give a path, a mapping of sections, or a fedtune.Job"
        )
    return job_from(
        {section: dict(keys) if isinstance(keys, Mapping) else keys for section, keys in job.items()}
    )


@dataclass(frozen=True)
class Run:
    """A run folder, opened. What it gives is read when it is first asked for.

    Attributes:
        folder: where the run lies.
        setup: what it was opened with; None: what its job names.
    """

    folder: RunFolder
    setup: OpenBase | None = None

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def job(self) -> Job:
        return self.folder.job()

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """A line for each finished round, round 0 (the start) first; keys as in metrics.jsonl."""
        return self.folder.metrics()

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json has. Raises RunError for a run that has none yet."""
        return dict(load_summary(self.path))

    def model(self) -> TunableModel:
        """The base with the trained values of the last round in it,
        a torch module in eval mode that is the caller's.

        Its forward takes what the base's encoder makes of examples, as keywords, and gives logits: [examples,
        labels], or [examples, length, vocabulary] of a language model. Raises RunError for a run without a
        checkpoint, or on another base than now lies there.
        """
        bundle, checkpoint = open_bundle(self.folder.bundle), self.folder.newest()
        if checkpoint is None:
            raise RunError(f"{self.path}: has no checkpoint yet; simulate to its end first")
        require_same_base(self.path, self._base.sha256, bundle.manifest.sha256, self.job.model.source)
        model = self._base.fresh_model()
        arrays = bundle.trained(method_of(bundle.job).shared(checkpoint.state.arrays))
        methods.merge(model, bundle.manifest.spec, bundle.frame, arrays)
        return model

    def predict(self, inputs: Iterable[Any], batch_size: int = 64) -> list[str]:
        """The label of each text, of the image at each path, or of each array for a module of one's own;
        of a language model the next token as text.
        """
        base, found = self._base, self._logits(list(inputs), batch_size).argmax(-1).tolist()
        return [base.labels[i] if base.task.has_head else base.encoder.decode(i) for i in found]

    def scores(self, inputs: Iterable[Any], batch_size: int = 64) -> np.ndarray:
        """Probabilities of the labels in the order of `summary["labels"]`, float32 [inputs, labels]."""
        logits = self._logits(list(inputs), batch_size)
        return torch.softmax(torch.from_numpy(logits), -1).numpy()

    def report(self) -> Path:
        """The run's page. Raises RunError where the job has report.html = false or the run is not whole."""
        if not self.folder.page.exists():
            raise RunError(f"{self.path}: has no page; simulate to its end with report.html = true")
        return self.folder.page

    def _logits(self, inputs: Sequence[Any], batch_size: int) -> np.ndarray:
        """Of each example's last prediction, float32 [inputs, classes]."""
        base, parts = self._base, []
        for start in range(0, len(inputs), batch_size):
            encoded = _encoded(base, inputs[start : start + batch_size])
            data = ClientData(encoded, np.zeros(len(encoded), np.int64))
            batch, _ = to_batch(data, np.arange(len(encoded)), base.encoder)
            with torch.inference_mode():
                logits = self._merged(**batch).numpy()
            parts.append(base.task.last(logits, {name: array.numpy() for name, array in batch.items()}))
        return np.concatenate(parts) if parts else np.zeros((0, base.classes), np.float32)

    @cached_property
    def _merged(self) -> TunableModel:
        return self.model()

    @cached_property
    def _base(self) -> OpenBase:
        if self.setup is not None:
            return self.setup
        if own := {"model", "data"} & self.folder.facts().get("own", {}).keys():
            raise RunError(
                f"{self.path}: began with {' and '.join(sorted(own))} passed from Python; give the same: "
                "fedtune.open_run(folder, model=…, data=…)"
            )
        job, labels = self.job, open_bundle(self.folder.bundle).manifest.labels
        return open_base(job.model_copy(update={"data": job.data.model_copy(update={"labels": labels})}))


def _encoded(base: OpenBase, inputs: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    """Raises DataError for an input that is not of the kind that the base takes."""
    if isinstance(base.encoder, ArrayEncoder):
        return [{INPUT: as_array(one, f"place {place}")} for place, one in enumerate(inputs)]
    return base.encoder.encode([str(one) for one in inputs])


def _begun(path: Path, job: Job) -> RunFolder | None:
    """The run that began here; None for a folder that is not there or empty.

    Raises RunError for a run of another job.
    """
    if not (path / "run.json").exists():
        return None
    folder = open_folder(path)
    if folder.job() != job:
        raise RunError(
            f"{path}: holds a run of another job; choose another out, or open it with fedtune.open_run"
        )
    return folder


def _name(it: Any) -> str:
    """How an object of the caller's is called in errors and files."""
    return str(getattr(it, "name", "") or getattr(it, "__name__", "") or type(it).__name__)[:100]


def _rule(aggregation: Aggregate) -> Rule:
    """Raises UserError for what is neither a rule nor a function."""
    if isinstance(aggregation, Rule):
        return aggregation
    if not callable(aggregation):
        raise UserError(
            f"aggregation: is a {type(aggregation).__name__}; "
            "give a function (updates, model) -> arrays by name"
        )
    name, function = _name(aggregation), aggregation

    def checked(updates: Sequence[Update], reference: Arrays) -> Mean | Arrays:
        try:
            found = function(updates, reference)
        except Exception as e:  # whatever the caller's own code raises
            raise UserError(f"aggregation {name}: fails on {len(updates)} updates ({_line(e)})") from e
        arrays = found.arrays if isinstance(found, Mean) else found
        _require_arrays(name, arrays, reference)
        return replace(found, arrays=_as_float32(arrays)) if isinstance(found, Mean) else _as_float32(arrays)

    return own_rule(checked, name)


def _require_arrays(name: str, arrays: Any, model: Arrays) -> None:
    if not isinstance(arrays, Mapping):
        raise UserError(
            f"aggregation {name}: gives a {type(arrays).__name__}; "
            "it should give arrays by the names of the model's tensors"
        )
    for key, array in arrays.items():
        if key not in model:
            raise UserError(
                f"aggregation {name}: gives {key!r}, which is no tensor of the model; "
                f"it should give some of {', '.join(list(model)[:4])}, …"
            )
        if not isinstance(array, np.ndarray) or array.shape != model[key].shape:
            shape = list(array.shape) if isinstance(array, np.ndarray) else type(array).__name__
            raise UserError(
                f"aggregation {name}: gives {shape} for {key}; "
                f"it should give an array {list(model[key].shape)}"
            )
        if not np.isfinite(array).all():
            raise UserError(
                f"aggregation {name}: gives a number that is not finite for {key}; "
                "it should give finite ones for finite updates"
            )


def _as_float32(arrays: Mapping[str, np.ndarray]) -> Arrays:
    return {key: np.asarray(array, np.float32) for key, array in arrays.items()}


def _draw(select: Select) -> Draw:
    """Raises UserError for what is no function."""
    if not callable(select):
        raise UserError(
            f"select: is a {type(select).__name__}; give a function (clients, round, generator) -> clients"
        )
    name = _name(select)

    def draw(clients: Sequence[ClientInfo], round: int, rng: np.random.Generator) -> list[ClientInfo]:
        try:
            found = list(select(clients, round, rng))
        except Exception as e:  # whatever the caller's own code raises
            raise UserError(f"select {name}: fails in round {round} ({_line(e)})") from e
        known = {client.name: client for client in clients}
        names = [one.name if isinstance(one, ClientInfo) else one for one in found]
        for one in names:
            if not isinstance(one, str) or one not in known:
                raise UserError(
                    f"select {name}: gives {one!r} in round {round}, which is no client that can be asked; "
                    "it should give some of those it is given"
                )
        if len(set(names)) != len(names):
            raise UserError(
                f"select {name}: gives a client twice in round {round}; it should give each at most once"
            )
        return [known[one] for one in names]

    return draw


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
