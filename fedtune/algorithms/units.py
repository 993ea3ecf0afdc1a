"""Which units each client trains in a round, from the job, the round and the client's budget alone: any party works out the same.

What can be selected are the transformer blocks or CNN stages with trained tensors. All else that is trained, such as the head, is
trained by everyone and does not count. A strategy puts the blocks of a round in an order, of which a client of budget b takes the
first b: so what a smaller budget trains, a larger one trains, too. top, bottom and both are the baselines of arXiv:2408.15600; lisa draws
the order anew for each round, as LISA (Pan et al. 2024, arXiv:2403.17919, Algorithm 1) does every K steps, here for all clients alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from fedtune.algorithms.base import Algorithm, State
from fedtune.errors import JobError
from fedtune.job import Job
from fedtune.seeds import generator
from fedtune.types import Assignment, ClientInfo, RoundReport
from fedtune.wire import Schema, packet_bytes

Budget = Callable[[str], int]
"""Blocks that this client may train; 0: as many as the job says."""


def blocks(schema: Schema) -> tuple[str, ...]:
    """The units that can be selected, from the bottom up."""
    return tuple(unit for unit in schema.units if unit.startswith("block."))


def order(strategy: str, blocks: Sequence[str], seed: int, round: int) -> tuple[str, ...]:
    """All blocks, those first that a small budget trains.

    >>> order("both", ("block.0", "block.1", "block.2"), 0, 1)
    ('block.2', 'block.0', 'block.1')
    """
    if strategy == "lisa":
        return tuple(blocks[place] for place in generator(seed, "units", round).permutation(len(blocks)).tolist())
    down = tuple(reversed(blocks))
    if strategy == "both":
        return tuple(unit for pair in zip(down, blocks) for unit in pair)[: len(blocks)]
    return down if strategy == "top" else tuple(blocks)


def selected(job: Job, schema: Schema, round: int, budget: int = 0) -> tuple[str, ...]:
    """What a client of this budget (0: the job's) trains, in the order of the schema."""
    return _taken(job, schema, job.units.strategy, round, budget)


def ever(job: Job, schema: Schema) -> tuple[str, ...]:
    """What any client may train in any round: nothing else ever changes."""
    return schema.units if job.units.strategy == "lisa" else selected(job, schema, 1, max(budgets(job)))


def lowest(job: Job, schema: Schema, budget: int = 0) -> tuple[str, ...]:
    """Of what this budget trains in any round, that whose backward pass goes down furthest and so keeps most."""
    return _taken(job, schema, "bottom" if job.units.strategy == "lisa" else job.units.strategy, 1, budget)


def most_numbers(job: Job, schema: Schema, budget: int = 0) -> int:
    """The most numbers that this budget trains in a round."""
    if job.units.strategy != "lisa":
        return sum(t.size for t in schema.of_units(selected(job, schema, 1, budget)))
    sizes = {unit: sum(t.size for t in schema.of_units([unit])) for unit in schema.units}
    largest = sorted((sizes.pop(unit) for unit in blocks(schema)), reverse=True)
    return sum(largest[: budget or job.units.budget]) + sum(sizes.values())


def _taken(job: Job, schema: Schema, strategy: str, round: int, budget: int) -> tuple[str, ...]:
    if strategy == "all":
        return schema.units
    found = blocks(schema)
    left = set(order(strategy, found, job.federation.seed, round)[budget or job.units.budget :])
    return tuple(unit for unit in schema.units if unit not in left)


def budgets(job: Job) -> tuple[int, ...]:
    """The job's own, then those that classes of devices have."""
    return tuple(dict.fromkeys([job.units.budget, *(device.units for device in job.simulation.devices if device.units)]))


def tensors_of(schema: Schema, units: Sequence[str]) -> tuple[str, ...] | None:
    """The tensors of these units, in the order of the schema; None where they are all."""
    found = tuple(t.name for t in schema.of_units(units))
    return None if len(found) == len(schema.tensors) else found


def round_bytes(job: Job, schema: Schema, rounds: int, budget: int = 0) -> list[tuple[int, int]]:
    """Bytes of the (model, update) packets of a client of this budget in each of the first rounds, at least one."""
    size = cache(lambda units: packet_bytes(schema, tensors_of(schema, units)))
    if job.units.strategy != "lisa":
        return [size(selected(job, schema, 1, budget))] * max(1, rounds)
    return [size(selected(job, schema, round, budget)) for round in range(1, max(1, rounds) + 1)]


def require_budgets(job: Job, schema: Schema) -> None:
    """Raises JobError where a budget asks for more blocks than there are."""
    if job.units.strategy == "all":
        return
    asked = [("units.budget", job.units.budget)]
    asked += [(f"simulation.devices.{place}.units", device.units) for place, device in enumerate(job.simulation.devices)]
    most = len(blocks(schema))
    if not most:
        raise JobError([f'units.strategy = "{job.units.strategy}": this base has no blocks in which adapter.method = "{job.adapter.method}" trains anything; use "all"'])
    if problems := [f"{key} = {count}: {most} blocks of this base have trained tensors; lower it" for key, count in asked if count > most]:
        raise JobError(problems)


def selecting(algorithm: Algorithm, job: Job, schema: Schema, budget: Budget = lambda client: 0) -> Algorithm:
    """The same, with each client training what its budget takes, on the part of the model that anybody trains in the round.

    What nobody trains stays as it is, with its moments, and no algorithm adds noise to it. Raises JobError as `require_budgets`.
    """
    require_budgets(job, schema)
    if job.units.strategy == "all":
        return algorithm
    most, settle = max(budgets(job)), algorithm.settle

    def plan(state: State, clients: Sequence[ClientInfo]) -> tuple[Assignment, ...]:
        drawn = algorithm.plan(state, clients)
        return tuple(replace(a, units=selected(job, schema, a.round, budget(a.client))) for a in drawn)

    def part(state: State) -> State:
        trained = schema.of_units(selected(job, schema, state.round + 1, most))
        return replace(state, arrays={t.name: state.arrays[t.name] for t in trained})

    def whole(before: State, ended: tuple[State, RoundReport]) -> tuple[State, RoundReport]:
        state, report = ended
        return replace(state, arrays=before.arrays | state.arrays), report

    return Algorithm(
        algorithm.init, plan, lambda state, updates: whole(state, algorithm.step(part(state), updates)),
        None if settle is None else lambda state, total, clients: whole(state, settle(part(state), total, clients)))
