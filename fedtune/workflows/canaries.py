"""Where an audit's canaries go: with the clients that the job asks most often, as far as that is known before."""

from collections import Counter

import numpy as np

from fedtune.algorithms import State
from fedtune.errors import UserError
from fedtune.privacy.canaries import Canaries, Directions, coins
from fedtune.privacy.plan import Plan
from fedtune.rounds import make_algorithm
from fedtune.seeds import generator
from fedtune.training.canaries import mislabelled
from fedtune.training.local import ClientData
from fedtune.workflows.setup import Setup

MOST = 10_000
"""Canaries unless told otherwise: with so many, noise of half its size shows at an epsilon of about 2. They cost little."""
MOST_TEXTS = 1000
"""The same of input canaries, each of which is trained on."""


def asked(setup: Setup, plan: Plan) -> Counter[str]:
    """Rounds in which the seed asks each client. Of an amplified job all count as never asked: nobody may know who will be."""
    if plan.job.privacy.amplification:
        return Counter(dict.fromkeys(setup.split.clients, 0))
    algorithm, clients = make_algorithm(setup.job, setup.spec.schema), setup.store.clients
    drawn = Counter(a.client for round in range(setup.job.federation.rounds) for a in algorithm.plan(State(round, {}), clients))
    return Counter({name: min(count, plan.budget or count) for name, count in drawn.items()})


def among_clients(setup: Setup, plan: Plan, count: int, seed: int) -> tuple[Canaries, Directions]:
    """Clients that are canaries: those asked most. Raises UserError where there are fewer than `count`; 0: as many as there are, up to MOST."""
    directions, drawn = Directions(setup.spec.size, seed), asked(setup, plan)
    most = min(len(drawn), directions.count)
    count = _allowed(count, MOST, most, f"the {len(drawn):,} clients that the job asks, and the {directions.count:,} directions of its update,")
    names = sorted(drawn, key=lambda name: -drawn[name])
    edge = drawn[names[count - 1]]
    tied = [name for name in names if drawn[name] == edge]
    chosen = [name for name in names if drawn[name] > edge]
    chosen += [tied[i] for i in generator(seed, "canary-clients").permutation(len(tied))[: count - len(chosen)]]
    return Canaries(chosen, np.arange(count), np.arange(count), coins(count, seed)), directions


def among_examples(setup: Setup, plan: Plan, count: int, seed: int) -> tuple[Canaries, Directions]:
    """Examples with a gradient of their own, spread over the clients asked most. Raises UserError as `among_clients` does."""
    directions, drawn = Directions(setup.spec.size, seed), asked(setup, plan)
    often = [name for name in drawn if drawn[name] == max(drawn.values())]
    count = _allowed(count, min(MOST, len(often) * directions.count), len(drawn) * directions.count, f"{directions.count:,} directions of each of {len(drawn):,} clients")
    names = sorted(drawn, key=lambda name: -drawn[name])[: max(len(often), -(-count // directions.count))]
    return Canaries(names, np.arange(count) % len(names), np.arange(count) // len(names), coins(count, seed)), directions


def among_texts(setup: Setup, plan: Plan, count: int, seed: int) -> tuple[Canaries, ClientData]:
    """Examples of the clients asked most, once more with a wrong label. Raises UserError as `among_clients` does."""
    classes = len(setup.labels)
    if classes < 2:
        raise UserError(f"--kind input: mislabels examples, which needs a task with labels; {setup.job.model.source} is for {setup.job.model.task}: use --kind gradient")
    drawn = asked(setup, plan)
    names = [name for name in drawn if drawn[name] == max(drawn.values())]
    parts = [setup.store.train(name) for name in names]
    whole = ClientData([e for part in parts for e in part.encoded], np.concatenate([part.labels for part in parts]))
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    count = _allowed(count, MOST_TEXTS, len(whole), "as many examples as the clients asked most have")
    rng = generator(seed, "canary-texts")
    places = rng.permutation(len(whole))[:count]
    return Canaries(names, owner[places], np.zeros(count, np.int64), coins(count, seed)), mislabelled(whole.take(places), classes, rng)


def _allowed(count: int, usual: int, most: int, why: str) -> int:
    if not 0 <= count <= most:
        raise UserError(f"--canaries {count}: {why} allow {most:,}; lower it, or leave it out")
    return count or min(usual, most)


