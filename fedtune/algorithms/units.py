"""Which units each client trains in a round, from the job, the round and the client's budget; and, where
clients are probed, from scores.

What can be selected are the transformer blocks or CNN stages with trained tensors. All else that is trained,
such as the head, is trained by everyone and does not count. A strategy puts the blocks of a round in an
order, of which a client of budget b takes the first b: so what a smaller budget trains, a larger one trains,
too (`fedtune.units.strategies`).

Strategies that probe go by what clients were asked (`fedtune.algorithms.probes`): in a round that begins with
a probe each client's own scores count (of one that did not answer, the mean), in the rounds up to the next
the mean of those scores stands for everybody.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from fedtune.adapters.describe import describe
from fedtune.adapters.spec import AdapterSpec, of_units
from fedtune.algorithms.base import Algorithm, State
from fedtune.algorithms.selection import choose, normalised
from fedtune.errors import JobError
from fedtune.job import DeviceClass, Job
from fedtune.models.layout import Layout
from fedtune.types import Assignment, ClientInfo, RoundReport
from fedtune.wire import Schema, packet_bytes


class Limits(NamedTuple):
    """What a client can bear; of each 0: as the job says.

    Attributes:
        blocks: that it trains in a round.
        depth: blocks, counted from the top, among which it may choose by scores; 0: all.
        rank: of its cores; 0: adapter.rank.
    """

    blocks: int = 0
    depth: int = 0
    rank: int = 0


AS_THE_JOB = Limits()


def limits_of(device: DeviceClass | None) -> Limits:
    """Of a client of this class; None: of no class."""
    return AS_THE_JOB if device is None else Limits(device.units, device.depth, device.rank)


def limits_in(job: Job) -> set[Limits]:
    """Of all kinds of clients there may be: of no class, and of each."""
    return {AS_THE_JOB, *map(limits_of, job.simulation.devices)}


LimitsOf = Callable[[str], Limits]
"""Of the client with this name."""
ROWS = "units.scores"
"""The slot that holds the scores of the last probe, [clients then drawn, blocks], each row with sum 1."""


def selected(job: Job, schema: Schema, round: int, budget: int = 0) -> tuple[str, ...]:
    """What a client of this budget (0: the job's) trains, in the order of the schema.

    Not of a strategy that goes by scores.
    """
    assert not job.units.probes
    return _taken(job, schema, round, budget)


def ever(job: Job, schema: Schema) -> tuple[str, ...]:
    """What any client may train in any round: nothing else ever changes."""
    return schema.units if job.units.varies else selected(job, schema, 1, _largest_budget(job, schema))


def spec_of(layout: Layout, job: Job) -> AdapterSpec:
    """The spec of the job's method on this base, with what any client may train in any round: the rest would
    be sent to and fro for nothing.

    Under units.fit, all: what clients can bear is found with this spec.
    """
    spec = describe(layout, job.adapter)
    units = spec.schema.units if job.units.fit else ever(job, spec.schema)
    return spec if units == spec.schema.units else of_units(spec, units)


def lowest(job: Job, schema: Schema, limits: Limits = AS_THE_JOB) -> tuple[str, ...]:
    """Of what a client of these limits trains in any round, that whose backward pass goes down
    furthest and so keeps most.
    """
    if job.units.varies:
        return _with(schema, within(schema, limits.depth)[: blocks_of(job, schema, limits.blocks)])
    return _taken(job, schema, 1, limits.blocks)


def within(schema: Schema, depth: int) -> tuple[str, ...]:
    """The blocks of the schema down to this depth, from the bottom up; 0: all.

    >>> from fedtune.types import TensorSpec
    >>> names = ("block.0", "block.1", "block.2", "head")
    >>> within(Schema(tuple(TensorSpec(name, (1,), name) for name in names)), 2)
    ('block.1', 'block.2')
    """
    return schema.blocks[-depth:]


def most_numbers(job: Job, schema: Schema, limits: Limits = AS_THE_JOB) -> int:
    """The most numbers that a client of these limits trains in a round."""
    held = schema.held(limits.rank)
    return sum(
        t.size
        for t in held.of_units(
            _largest(job, held, limits) if job.units.varies else selected(job, held, 1, limits.blocks)
        )
    )


def _largest(job: Job, schema: Schema, limits: Limits) -> tuple[str, ...]:
    """Of what a client of these limits may train of this schema, that with the most numbers."""
    size = {unit: sum(t.size for t in schema.of_units([unit])) for unit in within(schema, limits.depth)}
    return _with(schema, sorted(size, key=lambda unit: -size[unit])[: blocks_of(job, schema, limits.blocks)])


def _with(schema: Schema, taken: Sequence[str]) -> tuple[str, ...]:
    """These blocks and what is trained outside all blocks, in the order of the schema."""
    return tuple(unit for unit in schema.units if unit in taken or unit not in schema.blocks)


def blocks_of(job: Job, schema: Schema, budget: int) -> int:
    """How many a client of this budget trains: all where neither it nor the job says it,
    as live under units.fit.
    """
    return budget or job.units.budget or len(schema.blocks)


def _taken(job: Job, schema: Schema, round: int, budget: int) -> tuple[str, ...]:
    order = job.units.chosen.order
    if order is None:
        return schema.units
    return _with(schema, order(schema.blocks, job.federation.seed, round)[: blocks_of(job, schema, budget)])


def budgets(job: Job) -> tuple[int, ...]:
    """The job's own, then those that classes of devices have."""
    return tuple(
        dict.fromkeys(
            [job.units.budget, *(device.units for device in job.simulation.devices if device.units)]
        )
    )


def _largest_budget(job: Job, schema: Schema) -> int:
    return max(blocks_of(job, schema, budget) for budget in budgets(job))


def tensors_of(schema: Schema, units: Sequence[str], rank: int = 0) -> tuple[str, ...] | None:
    """The tensors of these units that a client of this rank has (0: all), in the order of the schema; None
    where they are all of the schema.
    """
    found = tuple(t.name for t in schema.held(rank).of_units(units))
    return None if len(found) == len(schema.tensors) else found


def round_bytes(job: Job, schema: Schema, rounds: int, limits: Limits = AS_THE_JOB) -> list[tuple[int, int]]:
    """Bytes of the (model, update) packets of a client of these limits in each of the first rounds, at
    least one; of blocks chosen by scores, the most.
    """
    size = cache(lambda units: packet_bytes(schema, tensors_of(schema, units, limits.rank), limits.rank))
    if job.units.probes:
        return [size(_largest(job, schema.held(limits.rank), limits))] * max(1, rounds)
    if not job.units.varies:
        return [size(selected(job, schema, 1, limits.blocks))] * max(1, rounds)
    return [size(selected(job, schema, round, limits.blocks)) for round in range(1, max(1, rounds) + 1)]


def unlimited(schema: Schema, depth: int) -> bool:
    """Whether a client of this depth can be probed: what a probe asks takes the backward
    pass through all blocks.
    """
    return not depth or depth >= len(schema.blocks)


def begins_with_probe(job: Job, round: int) -> bool:
    """Whether the clients of this round are asked what matters to them before they train."""
    return job.units.probes and (round - 1) % job.units.probe_every == 0


def with_scores(state: State, rows: Sequence[np.ndarray | None], schema: Schema) -> State:
    """The state after a probe. rows: scores, at least 0, [blocks], of each client of the coming round in the
    order it is drawn; None: no answer.

    Where nobody answered, what an earlier probe found still stands.
    """
    answered = [row for row in rows if row is not None]
    if not answered:
        common = _common(state, len(schema.blocks))
        return replace(
            state, slots=state.slots | {ROWS: np.broadcast_to(common, (len(rows), len(common))).copy()}
        )
    found = normalised(np.stack(answered).astype(np.float64))
    own = iter(found)
    return replace(
        state,
        slots=state.slots | {ROWS: np.stack([found.mean(0) if row is None else next(own) for row in rows])},
    )


def _common(state: State, count: int) -> np.ndarray:
    """The mean scores of the last probe, [blocks]; all equal before the first."""
    return state.slots[ROWS].mean(0) if ROWS in state.slots else np.full(count, 1.0 / count)


def by_common_scores(job: Job, schema: Schema, state: State, limits: Limits = AS_THE_JOB) -> tuple[str, ...]:
    """What a client of these limits trains between probes, where all go by the mean of the last."""
    state = replace(state, round=0, slots={ROWS: _common(state, len(schema.blocks))[None]})
    return _by_scores(job, schema, state, (Assignment("", 1, schema.units),), lambda client: limits)[0].units


def _by_scores(
    job: Job, schema: Schema, state: State, drawn: Sequence[Assignment], limits: LimitsOf
) -> tuple[Assignment, ...]:
    found, own = schema.blocks, state.slots.get(ROWS)
    if own is None or len(own) != len(drawn) or not begins_with_probe(job, state.round + 1):
        own = np.broadcast_to(_common(state, len(found)), (len(drawn), len(found)))
    borne = [limits(a.client) for a in drawn]
    most = np.array([blocks_of(job, schema, its.blocks) for its in borne], np.int64)
    depths = np.array([len(within(schema, its.depth)) for its in borne], np.int64)
    chosen = choose(own, most, job.units.consistency, depths) if drawn else ()
    return tuple(
        replace(a, units=_with(schema, [unit for unit, taken in zip(found, row) if taken]))
        for a, row in zip(drawn, chosen)
    )


def step_share(schema: Schema, units: Sequence[str]) -> float:
    """How much of the work of a step that trains all blocks remains with these units: the forward
    pass whole, half of the work, and the backward pass, with as much of it for each block, down to
    the lowest that is trained.

    >>> from fedtune.types import TensorSpec
    >>> names = ("block.0", "block.1", "head")
    >>> step_share(Schema(tuple(TensorSpec(name, (1,), name) for name in names)), ("block.1", "head"))
    0.75
    """
    found = schema.blocks
    if not found or "outside" in units:
        return 1.0
    lowest = next((place for place, unit in enumerate(found) if unit in units), len(found))
    return 1.0 - lowest / (2 * len(found))


def require_budgets(job: Job, schema: Schema) -> None:
    """Raises JobError where a budget asks for more blocks than there are, and where clients are to be
    probed and no class of devices can be.
    """
    if job.units.chosen.whole:
        return
    asked = [("units.budget", job.units.budget)]
    asked += [
        (f"simulation.devices.{place}.{key}", count)
        for place, device in enumerate(job.simulation.devices)
        for key, count in (("units", device.units), ("depth", device.depth))
    ]
    most = len(schema.blocks)
    if not most:
        raise JobError(
            [
                (
                    f'units.strategy = "{job.units.strategy}": this base has no blocks in which '
                    f'adapter.method = "{job.adapter.method}" trains anything; use "all"'
                )
            ]
        )
    if problems := [
        f"{key} = {count}: {most} blocks of this base have trained tensors; lower it"
        for key, count in asked
        if count > most
    ]:
        raise JobError(problems)
    depths = [device.depth for device in job.simulation.devices]
    if job.units.probes and depths and not any(unlimited(schema, depth) for depth in depths):
        raise JobError(
            [
                f'units.strategy = "{job.units.strategy}": a probe takes the backward pass through all '
                f"{most} blocks, and no class of simulation.devices can go deeper than {max(depths)}; "
                'give one more memory-mb, units.seconds or depth, or use "top" or "lisa"'
            ]
        )


def ranked(algorithm: Algorithm, limits: LimitsOf) -> Algorithm:
    """The same, with each client training what its rank has: a piece of a core is then averaged over those
    that have it, and one that nobody trained stays.
    """

    def plan(state: State, clients: Sequence[ClientInfo]) -> tuple[Assignment, ...]:
        return tuple(replace(a, rank=limits(a.client).rank) for a in algorithm.plan(state, clients))

    return replace(algorithm, plan=plan)


def selecting(
    algorithm: Algorithm, job: Job, schema: Schema, limits: LimitsOf = lambda client: AS_THE_JOB
) -> Algorithm:
    """The same, with each client training what its budget takes, on the part of the model that
    anybody trains in the round.

    What nobody trains stays as it is, with its moments, and no algorithm adds noise to it.
    Raises JobError as `require_budgets`.
    """
    require_budgets(job, schema)
    if job.units.chosen.whole:
        return algorithm
    most, settle = _largest_budget(job, schema), algorithm.settle

    def plan(state: State, clients: Sequence[ClientInfo]) -> tuple[Assignment, ...]:
        drawn = algorithm.plan(state, clients)
        if job.units.probes:
            return _by_scores(job, schema, state, drawn, limits)
        return tuple(replace(a, units=selected(job, schema, a.round, limits(a.client).blocks)) for a in drawn)

    def part(state: State) -> State:
        if job.units.probes:
            return state
        trained = schema.of_units(selected(job, schema, state.round + 1, most))
        return replace(state, arrays={t.name: state.arrays[t.name] for t in trained})

    def whole(before: State, ended: tuple[State, RoundReport]) -> tuple[State, RoundReport]:
        state, report = ended
        return replace(state, arrays=before.arrays | state.arrays), report

    return Algorithm(
        algorithm.init,
        plan,
        lambda state, updates: whole(state, algorithm.step(part(state), updates)),
        None
        if settle is None
        else lambda state, total, clients: whole(state, settle(part(state), total, clients)),
    )
