"""How many canaries a job has room for, and where they go: with the clients that it asks most often, as far as that is known before."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedtune.algorithms import State
from fedtune.errors import UserError
from fedtune.privacy.canaries import Canaries, Directions, View, coins
from fedtune.privacy.plan import Plan
from fedtune.rounds import make_algorithm
from fedtune.seeds import generator
from fedtune.training.canaries import mislabelled
from fedtune.training.local import ClientData
from fedtune.workflows.setup import Setup

MOST = 10_000
"""Canaries unless told otherwise, or fewer where they show more: with so many, noise of half its size shows at an epsilon of about 2."""
MOST_TEXTS = 1000
"""The same of input canaries, each of which is trained on."""


@dataclass(frozen=True)
class Room:
    """A job's room for canaries. `seed`: of the coins and of where canaries are."""

    setup: Setup
    plan: Plan
    seed: int

    @cached_property
    def asked(self) -> Counter[str]:
        """Rounds in which each client is asked, by the seed; of an amplified job all rounds, as nobody may know in which."""
        if self.plan.job.privacy.amplification:
            return Counter(dict.fromkeys(self.setup.split.clients, self.plan.rounds))
        algorithm, clients = make_algorithm(self.setup.job, self.setup.spec.schema), self.setup.store.clients
        drawn = Counter(a.client for round in range(self.setup.job.federation.rounds) for a in algorithm.plan(State(round, {}), clients))
        return Counter({name: min(count, self.plan.budget or count) for name, count in drawn.items()})

    @cached_property
    def most_asked(self) -> list[str]:
        """All clients that are asked, those asked most first, and of those asked as often in an order drawn by chance."""
        names = list(self.asked)
        order = generator(self.seed, "canary-clients").permutation(len(names))
        return sorted((names[i] for i in order), key=lambda name: -self.asked[name])

    @cached_property
    def often(self) -> list[str]:
        """Those asked as often as any."""
        return [name for name in self.most_asked if self.asked[name] == max(self.asked.values())]

    @cached_property
    def directions(self) -> Directions:
        return Directions(self.setup.spec.size, self.seed)

    @property
    def view(self) -> View:
        """What there is to see of a canary of a client that is asked most."""
        release, rounds = self.plan.release([]), max(self.asked.values(), default=1)
        rate = release.sample / release.population if release.sampling == "fixed" else release.rate
        return View(self.plan.parts["update"], rate, rounds * self.plan.steps, release.sampling == "fixed")

    def clients(self, count: int) -> Canaries:
        """Clients that are canaries."""
        return Canaries(self.most_asked[:count], np.arange(count), np.arange(count), coins(count, self.seed))

    def client_room(self) -> tuple[int, int, str]:
        """(canaries that are of use, the most there can be, why no more)."""
        most = min(len(self.most_asked), self.directions.count)
        return min(MOST, most), most, f"{len(self.most_asked):,} clients are asked, and an update has {self.directions.count:,} directions"

    def examples(self, count: int) -> Canaries:
        """Examples with a gradient of their own, spread over as many clients as are asked most, or as are needed."""
        names = self.most_asked[: max(len(self.often), -(-count // self.directions.count))]
        return Canaries(names, np.arange(count) % len(names), np.arange(count) // len(names), coins(count, self.seed))

    def example_room(self) -> tuple[int, int, str]:
        """As `client_room`."""
        each = self.directions.count
        return min(MOST, len(self.often) * each), len(self.most_asked) * each, f"{len(self.most_asked):,} clients are asked, of whose gradients each has {each:,} directions"

    def texts(self, count: int) -> tuple[Canaries, ClientData]:
        """Examples of the clients asked most, once more with a wrong label."""
        parts = [self.setup.store.train(name) for name in self.often]
        whole = ClientData([e for part in parts for e in part.encoded], np.concatenate([part.labels for part in parts]))
        owner, rng = np.repeat(np.arange(len(parts)), [len(part) for part in parts]), generator(self.seed, "canary-texts")
        places = rng.permutation(len(whole))[:count]
        data = mislabelled(whole.take(places), len(self.setup.labels), rng)
        return Canaries(self.often, owner[places], np.zeros(count, np.int64), coins(count, self.seed)), data

    def text_room(self) -> tuple[int, int, str]:
        """As `client_room`. Raises UserError for a task without two labels."""
        if len(self.setup.labels) < 2:
            raise UserError(f"--kind input: mislabels examples, but a {self.setup.job.model.task} job has no labels to choose from; use --kind gradient")
        most = sum(self.setup.store.clients[self.setup.split.clients.place(name)].examples for name in self.often)
        return min(MOST_TEXTS, most), most, f"the clients that are asked most hold {most:,} examples"
