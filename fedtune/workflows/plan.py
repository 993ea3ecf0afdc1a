"""fedtune plan: what a job will train, send and need, before anything runs.

Needs a base's config, not its weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save

from fedtune import packages
from fedtune.adapters.describe import describe
from fedtune.adapters.kinds.table import METHODS
from fedtune.adapters.ranks import ranks_in
from fedtune.algorithms.probes import probe_bytes
from fedtune.algorithms.units import (
    AS_THE_JOB,
    Limits,
    ever,
    limits_in,
    limits_of,
    lowest,
    most_numbers,
    require_budgets,
    round_bytes,
    selected,
    spec_of,
    step_share,
    unlimited,
    within,
)
from fedtune.bundles.bundle import shipped_of
from fedtune.bundles.subspace import travelling
from fedtune.data.examples import PACKAGE_READERS, load_dataset
from fedtune.data.partition import Split, split
from fedtune.errors import DataError, EnvironmentProblem, UserError
from fedtune.job import DeviceClass, Job
from fedtune.models.base import layout
from fedtune.models.load import load_encoder, sketch_model
from fedtune.models.sources import check_hash, locate
from fedtune.privacy.plan import plan_of, warnings_of
from fedtune.report.format import duration, size
from fedtune.round.gradient_init import gradient_bytes, init_warnings
from fedtune.simulation.devices import able, assign, span
from fedtune.stateful.methods import method_of
from fedtune.stateful.store import VERSIONS, file_bytes
from fedtune.tasks import task_named
from fedtune.training.memory import NUMBER, step_memory
from fedtune.wire import Schema
from fedtune.workflows.budgets import fitted, mean_examples
from fedtune.workflows.privacy import figure

Trained = Literal["always", "drawn", "chosen", "some", "never"]


@dataclass(frozen=True)
class Unit:
    """A block and what could be trained in it. `trained`: in which rounds, by those whose class has no budget
    of its own; some: by those of classes with a larger one alone; never: by nobody, so that without units.fit
    it is no part of the adapter.
    """

    name: str
    numbers: int
    bytes: int
    selectable: bool
    trained: Trained


@dataclass(frozen=True)
class DeviceTime:
    """What a round costs a device of a class, in simulated seconds, as the mean over all clients' examples.
    `blocks` are those that it trains, 0 where all train all, chosen among the last `depth`, 0 where they are
    not chosen by scores; `probe` is what a probe takes, where the round begins with one and the class can be
    probed. `rank` is that of its cores, 0 without any; `numbers` are the most that it trains in a round,
    `update_bytes` the most that it sends of them, and `model_bytes` what it receives. `memory` is what a
    training step needs, in bytes.

    `able`: whether the class has the memory. `frame`: what receiving the frame adds to a client's first
    round. None is not known.
    """

    name: str
    clients: int
    able: bool
    available: float
    drop_out: float
    down: float
    train: float | None
    up: float
    frame: float
    blocks: int = 0
    depth: int = 0
    probed: bool = False
    probe: float | None = None
    rank: int = 0
    numbers: int = 0
    model_bytes: int = 0
    update_bytes: int = 0
    memory: int | None = None

    @property
    def seconds(self) -> float | None:
        return None if self.train is None else self.down + self.train + self.up


@dataclass(frozen=True)
class JobPlan:
    """Bytes are those of serialised messages.

    Totals that depend on who is drawn are expectations, said as such.

    An update is the largest that a client of the job's own budget and rank sends; the memory is that of
    such a client. `budget` is that number of blocks, all of them where `strategy` is all. `ranks` are
    those of all clients, where they are not equal. `kept_bytes` is the most that a client keeps on its
    disk from round to round, 0 where it keeps nothing, and `kept_total` the most that the clients that are
    expected to take part in a simulation keep together. A probe's bytes are both ways, for one client.
    `unit` is what privacy protects, "none" for nothing, and `epsilon` at `delta` the most one unit can
    lose: "inf" without protection. `device` is the memory of one training client in bytes: its parts are
    computed from shapes, not measured.
    """

    source: str
    weights: bool
    base_parameters: int
    method: str
    rank: int
    modules: int
    trainable: int
    head: int
    strategy: str
    budget: int
    units: tuple[Unit, ...]
    model_bytes: int
    update_bytes: int
    probe_bytes: int
    probes: int
    frame_bytes: int
    rounds: int
    cohort: int
    clients: int
    round_bytes: int
    expected_first_time: float
    init_bytes: int
    total_bytes: float
    kept_bytes: int
    kept_total: int
    device: dict[str, int | None]
    devices: tuple[DeviceTime, ...]
    ranks: tuple[int, ...]
    unit: str
    epsilon: float | str
    delta: float
    noise_multiplier: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"devices": [asdict(d) | {"seconds": d.seconds} for d in self.devices]}


def make_plan(job: Job) -> JobPlan:
    """Reads the base's config and, where it is there, the data. Raises UserErrors of one line."""
    source = locate(job.model.source)
    if source.weights:
        load_encoder(job.model, source)
        if job.model.sha256:
            check_hash(source, job.model.sha256)
    classes, clients, parts, notes = _data(job)
    sketch = sketch_model(job.model, source, classes)
    base = layout(sketch)
    whole, spec = describe(base, job.adapter), spec_of(base, job)
    schema = travelling(job, spec)
    require_budgets(job, schema)
    fed, examples = job.federation, None if parts is None else mean_examples(parts, job.federation)
    ranks = ranks_in(job, spec)

    @cache
    def memories(limits: Limits) -> dict[str, int | None]:
        return step_memory(job, spec, sketch_model(job.model, source, classes), limits)

    def memory_of(limits: Limits) -> int | None:
        return memories(limits)["total"]

    job = fitted(job, schema, memory_of, examples or fed.local_steps * fed.batch_size)
    sizes = {limits: round_bytes(job, schema, job.federation.rounds, limits) for limits in limits_in(job)}
    model, update = (max(column) for column in zip(*sizes[AS_THE_JOB]))
    once = (spec.frame, spec.trainable if "initial.safetensors" in shipped_of(job) else ())
    frame = sum(
        len(save({t.name: np.zeros(t.shape, np.float32) for t in tensors})) for tensors in once if tensors
    )
    init = (
        min(job.adapter.init_clients, clients) * sum(gradient_bytes(spec))
        if job.adapter.asks_gradients
        else 0
    )
    memory, steps = memories(AS_THE_JOB), {limits: memory_of(limits) for limits in sizes}
    devices = _devices(job, schema, clients, examples, steps, sizes, frame)
    drawable = max(1, sum(d.clients for d in devices if d.able)) if devices else clients
    cohort = min(fed.cohort, drawable)
    own = method_of(job).keeps
    keeps = min(fed.rounds, VERSIONS) * file_bytes(own(spec.schema)) if own else 0
    first = holders(drawable, cohort, fed.rounds)
    probes, probe = (
        (-(-fed.rounds // job.units.probe_every), probe_bytes(schema)) if job.units.probes else (0, (0, 0))
    )
    asked = sum(d.clients for d in devices if d.able and d.probed) / drawable if devices else 1.0
    exchanged = cohort * (
        fed.rounds
        * _mean_bytes(devices, job, {limits: sum(map(sum, of)) / len(of) for limits, of in sizes.items()})
        + (
            probes
            and asked
            * probes
            * _mean_bytes(
                devices, job, {limits: sum(probe_bytes(schema, limits.rank)) for limits in sizes}, probed=True
            )
        )
    )
    privacy = plan_of(job, clients)
    notes += [*warnings_of(privacy), *init_warnings(spec, privacy)] if privacy else []
    lost = privacy.reading().epsilon if privacy and job.privacy.noise == "system" else math.inf
    if not source.weights:
        notes.append("the weights are not here: numbers and bytes are exact, but nothing can be trained yet")
    notes += _curved_notes(job, memory)
    notes += _units_notes(job, schema)
    notes += _select_notes(job, fed.rounds * cohort / drawable)
    notes += [
        note
        for device, made in zip(job.simulation.devices, devices)
        for note in _device_notes(job, device, made, steps[limits_of(device)])
    ]
    if ranks is not None and not any(device.rank in (0, spec.rank) for device in job.simulation.devices):
        notes.append(
            f"ranks: no class has adapter.rank = {spec.rank}, so in a simulation what lies beyond rank "
            f"{ranks.all[-2]} stays as it starts; lower it, or give a class that rank"
        )
    return JobPlan(
        job.model.source,
        bool(source.weights),
        base.size,
        spec.method,
        spec.rank,
        len(spec.linears),
        spec.size,
        spec.head_size,
        job.units.strategy,
        job.units.budget or len(schema.blocks),
        _units(job, travelling(job, whole)),
        model,
        update,
        sum(probe),
        probes,
        frame,
        fed.rounds,
        cohort,
        clients,
        round(exchanged / fed.rounds),
        first,
        init,
        exchanged + first * frame + init,
        keeps,
        round(keeps * first),
        memory,
        devices,
        () if ranks is None else ranks.all,
        job.privacy.unit,
        figure(lost),
        privacy.delta if privacy else 0.0,
        privacy.parts["update"] if privacy else 0.0,
        tuple(notes),
    )


def holders(clients: int, cohort: int, rounds: int) -> float:
    """Expected number of different clients drawn: K(1 - (1 - c/K)^R) for R
    independent cohorts of c out of K.
    """
    return clients * (1 - (1 - cohort / clients) ** rounds)


def _data(job: Job) -> tuple[int, int, Split | None, list[str]]:
    """(labels, clients, split, notes).

    Where the data is not there, the job must say what they are; data that is wrong is refused.
    """
    try:
        dataset = load_dataset(job.data, job.model, job.federation.seed)
        parts = split(dataset.examples, job.data, job.federation.seed)
        return max(1, len(dataset.label_names)), len(parts.clients), parts, []
    except (UserError, EnvironmentProblem) as e:
        if isinstance(e, UserError) and _there(job.data.source):
            raise
        known = len(job.data.labels) or (0 if task_named(job.model.task).has_head else 1)
        if not known or not job.data.clients:
            raise type(e)(
                f"{e}; or name data.labels and data.clients in the job, and the plan needs no data"
            ) from None
        return (
            known,
            job.data.clients,
            None,
            [f"the data was not read ({e}): labels and clients are taken from the job"],
        )


def _there(source: str) -> bool:
    """Whether there is data to be wrong about; also for a name that can never be fetched."""
    scheme, colon, name = source.partition(":")
    if not colon or scheme != "package":
        return Path(source).expanduser().exists()
    try:
        return name not in PACKAGE_READERS or packages.find(name).is_dir()
    except DataError:
        return False


def _units(job: Job, schema: Schema) -> tuple[Unit, ...]:
    found, selectable = [], schema.blocks
    taken, some = (schema.units,) * 2 if job.units.varies else (selected(job, schema, 1), ever(job, schema))
    for name in schema.units:
        numbers = sum(t.size for t in schema.of_units([name]))
        trained: Trained = "always" if name in taken else "some" if name in some else "never"
        if job.units.varies and name in selectable:
            trained = "chosen" if job.units.probes else "drawn"
        found.append(Unit(name, numbers, NUMBER * numbers, name in selectable, trained))
    return tuple(found)


Sizes = dict[Limits, list[tuple[int, int]]]
"""Bytes of the (model, update) packets of each round."""


def _mean_bytes(
    devices: Sequence[DeviceTime], job: Job, means: Mapping[Limits, float], probed: bool = False
) -> float:
    """Of what a client of these limits has in the mean, over the clients that can take part, or those of
    them that can be probed, each as likely to be drawn as any.
    """
    weighed = [
        (d.clients, means[limits_of(device)])
        for device, d in zip(job.simulation.devices, devices)
        if d.able and d.clients and (d.probed or not probed)
    ]
    return sum(n * mean for n, mean in weighed) / sum(n for n, _ in weighed) if weighed else means[AS_THE_JOB]


def _devices(
    job: Job,
    schema: Schema,
    clients: int,
    examples: float | None,
    steps: dict[Limits, int | None],
    sizes: Sizes,
    frame: int,
) -> tuple[DeviceTime, ...]:
    """Each class of the job: its clients, as a run draws them, and its times. steps: bytes that a training
    step needs; frame: its bytes; examples: that a client runs in a round.
    """
    devices, fed = job.simulation.devices, job.federation
    if not devices:
        return ()
    held = np.bincount(assign(fed.seed, devices, clients), minlength=len(devices)).tolist()
    mean = method_of(job).gradients * (examples or 0.0)
    largest = [
        (
            max(model for model, _ in sizes[limits_of(device)]),
            max(update for _, update in sizes[limits_of(device)]),
        )
        for device in devices
    ]
    probed = min(mean, job.units.probe_batches * fed.batch_size)

    def probes(device: DeviceClass) -> bool:
        return job.units.probes and unlimited(schema, device.depth)

    def probing(device: DeviceClass) -> float | None:
        question, answer = probe_bytes(schema, device.rank)
        return (
            span(device, question, probed, answer).total
            if probes(device) and (examples is not None or not device.speed)
            else None
        )

    work = [step_share(schema, lowest(job, schema, limits_of(device))) for device in devices]
    spans = [
        span(device, model, share * mean, update)
        for device, share, (model, update) in zip(devices, work, largest)
    ]
    return tuple(
        DeviceTime(
            device.name,
            count,
            bool(fit),
            device.available,
            device.drop_out,
            s.down,
            None if examples is None and device.speed else s.train,
            s.up,
            span(device, frame, 0, 0).down,
            0 if job.units.chosen.whole else device.units or job.units.budget,
            len(within(schema, device.depth)) if job.units.probes else 0,
            probes(device),
            probing(device),
            (device.rank or job.adapter.rank) if METHODS[job.adapter.method].cores else 0,
            most_numbers(job, schema, limits_of(device)),
            *bytes_,
            memory=steps[limits_of(device)],
        )
        for device, count, fit, s, bytes_ in zip(
            devices, held, able(devices, [steps[limits_of(device)] for device in devices]), spans, largest
        )
    )


def _units_notes(job: Job, schema: Schema) -> list[str]:
    """Where tensors below the blocks make every backward pass go all the way down."""
    if job.units.chosen.whole or "outside" not in schema.units:
        return []
    outside = schema.of_units(["outside"])
    return [
        f"units: {len(outside)} tensors outside the blocks ({outside[0].name}, …) "
        "are always trained, so that a step may need nearly the memory of training all; "
        "of the methods, fed-sb and lora have none there"
    ]


def _select_notes(job: Job, taken: float) -> list[str]:
    """Where most clients never get an entry of their own. taken: rounds that a client is
    expected to take part in.
    """
    every = job.personal.every
    if job.personal.method != "select" or taken >= every:
        return []
    return [
        (
            f"personal.every = {every}: a client is expected to take part in {taken:.2g} rounds, "
            "so that most would never have entries of their own; lower it, or give more rounds"
        )
    ]


def _curved_notes(job: Job, memory: dict[str, int | None]) -> list[str]:
    """What an image base pays for swish, h-swish and squeeze-and-excitation,
    where it pays much (TinyTL, section 3.1).
    """
    kept, curved = memory["activations"], memory["curved"]
    base = task_named(job.model.task).inputs.base
    if not base or not kept or not curved or curved < kept / 4:
        return []
    return [
        f"{size(curved)} of the {size(kept)} of activations are kept by swish, h-swish or sigmoid "
        "activations and by gates (squeeze-and-excitation), which need their values; a base with ReLU6 and "
        f"without gates, such as {base}, keeps one bit a value there"
    ]


def _device_notes(job: Job, device: DeviceClass, made: DeviceTime, step: int | None) -> list[str]:
    deadline, seconds = job.federation.deadline, job.units.seconds
    if not made.able:
        need = "an unknown amount" if step is None else size(step)
        return [
            (
                f"{device.name}: memory-mb = {device.memory_mb}, a training step needs {need}: "
                f"its {made.clients} clients cannot take part"
            )
        ]
    if seconds and made.train is None:
        return [
            (
                f"{device.name}: how many examples clients hold is not known, so its blocks are "
                "not fitted to units.seconds"
            )
        ]
    if seconds and made.train is not None and made.train > seconds:
        return [
            (
                f"{device.name}: one block is the least, and training it takes {duration(made.train)}, "
                f"units.seconds = {seconds:g}"
            )
        ]
    if made.seconds is not None and made.seconds > deadline:
        return [
            (
                f"{device.name}: a round takes {duration(made.seconds)} with a client's mean examples, "
                f"federation.deadline = {deadline:g} s: most of its clients will miss it"
            )
        ]
    return []
