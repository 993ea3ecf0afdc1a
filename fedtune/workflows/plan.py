"""fedtune plan: what a job will train, send and need, before anything runs. Needs a base's config, not its weights."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from fedtune import packages
from fedtune.adapters.spec import AdapterSpec, describe
from fedtune.data.examples import PACKAGE_READERS, load_dataset
from fedtune.data.partition import split
from fedtune.errors import DataError, EnvironmentProblem, UserError
from fedtune.job import Job
from fedtune.models.base import layout
from fedtune.models.load import load_encoder, sketch_model
from fedtune.models.sources import check_hash, locate
from fedtune.training.memory import saved_bytes
from fedtune.training.worker import gradient_schema
from fedtune.wire import Schema, encode, packet_bytes

NUMBER = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Unit:
    """A block and what is trained in it."""

    name: str
    numbers: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Bytes are those of serialised messages. Totals that depend on who is drawn are expectations, said as such.

    `device` is the memory of one training client in bytes: its parts are computed from shapes, not measured.
    """

    source: str
    weights: bool
    base_parameters: int
    method: str
    rank: int
    modules: int
    trainable: int
    head: int
    units: tuple[Unit, ...]
    model_bytes: int
    update_bytes: int
    frame_bytes: int
    rounds: int
    cohort: int
    clients: int
    round_bytes: int
    expected_first_time: float
    init_bytes: int
    total_bytes: float
    device: dict[str, int | None]
    epsilon: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(job: Job) -> Plan:
    """Reads the base's config and, where it is there, the data. Raises UserErrors of one line."""
    source = locate(job.model.source)
    if source.weights:
        load_encoder(job.model, source)
        if job.model.sha256:
            check_hash(source, job.model.sha256)
    classes, clients, notes = _data(job)
    sketch = sketch_model(job.model, source, classes)
    spec = describe(layout(sketch), job.adapter)
    parameters = layout(sketch).size
    model, update = packet_bytes(spec.schema)
    frame = len(save({t.name: np.zeros(t.shape, np.float32) for t in spec.frame})) if spec.frame else 0
    init = _init_bytes(job, spec, clients)
    fed = job.federation
    cohort = min(fed.cohort, clients)
    first = holders(clients, cohort, fed.rounds)
    if not source.weights:
        notes.append("the weights are not here: numbers and bytes are exact, but nothing can be trained yet")
    return Plan(
        job.model.source, bool(source.weights), parameters, spec.method, spec.rank, len(spec.linears), spec.size, spec.head_size, _units(spec),
        model, update, frame, fed.rounds, cohort, clients, cohort * (model + update), first, init,
        fed.rounds * cohort * (model + update) + first * frame + init, _device(job, spec, sketch, parameters), "inf", tuple(notes),
    )


def holders(clients: int, cohort: int, rounds: int) -> float:
    """Expected number of different clients drawn: K(1 - (1 - c/K)^R) for R independent cohorts of c out of K."""
    return clients * (1 - (1 - cohort / clients) ** rounds)


def _data(job: Job) -> tuple[int, int, list[str]]:
    """(labels, clients, notes). Where the data is not there, the job must say what they are; data that is wrong is refused."""
    try:
        dataset = load_dataset(job.data, job.model, job.federation.seed)
        parts = split(dataset.examples, job.data, job.federation.seed)
        return max(1, len(dataset.label_names)), len(parts.clients), []
    except (UserError, EnvironmentProblem) as e:
        if isinstance(e, UserError) and _there(job.data.source):
            raise
        known = len(job.data.labels) or (1 if job.model.task == "causal-lm" else 0)
        if not known or not job.data.clients:
            raise type(e)(f"{e}; or name data.labels and data.clients in the job, and the plan needs no data") from None
        return known, job.data.clients, [f"the data was not read ({e}): labels and clients are taken from the job"]


def _there(source: str) -> bool:
    """Whether there is data to be wrong about; also for a name that can never be fetched."""
    scheme, colon, name = source.partition(":")
    if not colon or scheme != "package":
        return Path(source).expanduser().exists()
    try:
        return name not in PACKAGE_READERS or packages.find(name).is_dir()
    except DataError:
        return False


def _units(spec: AdapterSpec) -> tuple[Unit, ...]:
    numbers: dict[str, int] = {}
    for t in spec.trainable:
        numbers[t.unit] = numbers.get(t.unit, 0) + t.size
    return tuple(Unit(name, n, NUMBER * n) for name, n in numbers.items())


def _init_bytes(job: Job, spec: AdapterSpec, clients: int) -> int:
    """Bytes of a gradient initialisation: a request down and one weight gradient per linear up, for each asked client."""
    if job.adapter.init != "gradient":
        return 0
    schema = gradient_schema(spec)
    up = len(encode("gradient", schema, {t.name: np.zeros(t.shape, np.float32) for t in schema.tensors}, round=0, weight=1.0))
    return min(job.adapter.init_clients, clients) * (up + len(encode("gradient-request", Schema(()), {}, round=0)))


def _device(job: Job, spec: AdapterSpec, sketch: Any, parameters: int) -> dict[str, int | None]:
    states = {"adamw": 2, "adam": 2, "sgd": 1 if job.federation.momentum else 0}[job.federation.optimizer]
    side = job.model.image_size if job.model.task == "image-classification" else job.model.max_length
    parts: dict[str, int | None] = {
        "base": NUMBER * (parameters + spec.head_size),
        "frame": NUMBER * sum(t.size for t in spec.frame),
        "adapter_gradients_optimizer": NUMBER * (2 + states) * spec.size,
        "activations": saved_bytes(sketch, spec, job.federation.batch_size, side),
    }
    known = [v for v in parts.values() if v is not None]
    return parts | {"total": sum(known) if len(known) == len(parts) else None}
