"""fedtune simulate: one job, many clients, one machine, one run folder."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from fedtune.adapters import frames
from fedtune.adapters.layers.stacked import NotStackable
from fedtune.adapters.methods import write
from fedtune.adapters.ranks import at_rank
from fedtune.aggregation.rules import Rule
from fedtune.algorithms.fed_avg import Draw
from fedtune.algorithms.units import AS_THE_JOB, Limits, by_common_scores, ever, selected, tensors_of
from fedtune.bundles.bundle import open_bundle
from fedtune.client.app import make_client_app
from fedtune.common.metrics import with_personal
from fedtune.common.seeds import generator
from fedtune.common.trees import digest
from fedtune.data.clients import CACHE_BYTES, Stream
from fedtune.errors import EnvironmentProblem
from fedtune.job import SimulationSection
from fedtune.models.base import TunableModel
from fedtune.privacy.plan import PrivacyPlan, plan_of
from fedtune.round.algorithm import make_algorithm
from fedtune.round.coordinator import Coordinator, start
from fedtune.round.gradient_init import gather_gradients
from fedtune.round.keeping import personal_model
from fedtune.round.lines import evaluated
from fedtune.round.loop import run_rounds
from fedtune.round.replies import Exchange
from fedtune.round.traffic import Traffic
from fedtune.round.watch import Watch
from fedtune.runs.folder import RunFolder, open_run
from fedtune.server.app import make_server_app
from fedtune.simulation.engines import ENGINES, Simulated
from fedtune.simulation.fleet import Fleet
from fedtune.simulation.vectorised import memory_for
from fedtune.stateful.methods import method_of
from fedtune.stateful.store import Kept
from fedtune.training.cohort import CohortTrainer
from fedtune.training.evaluate import Scores
from fedtune.training.features import FeatureStore
from fedtune.training.local import only
from fedtune.training.together import open_trainer
from fedtune.training.worker import Worker
from fedtune.types import Arrays, Metrics
from fedtune.workflows.fleet import make_fleet
from fedtune.workflows.setup import Setup, data_free_frame, make_bundle, open_setup
from fedtune.workflows.summary import follow


def require_device(settings: SimulationSection) -> None:
    """Raises EnvironmentProblem where the job's device is not there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem('simulation.device = "cuda": this torch finds no such device; use "cpu"')


def _room(settings: SimulationSection, folder: Path) -> tuple[int, Path | None]:
    """(bytes, folder) for kept features: half the engine's memory, or half of what is free on the disk."""
    if settings.features == "disk":
        return shutil.disk_usage(folder).free // 2, folder
    return memory_for(settings) // 2 if settings.features == "memory" else 0, None


TRIAL = 6
"""Examples with which the vectorised engine is tried on a base."""
WEEK = 604_800.0
"""Seconds: how long an engine may take where the job's deadline holds in simulated time."""


@dataclass
class Simulation:
    """One run being simulated: the setup, one base in this process (loaded unless given),
    and the held-out data of all clients.
    """

    setup: Setup
    run: RunFolder
    watch: Watch = field(default_factory=Watch)
    base: TunableModel | None = None
    rule: Rule | None = None
    draw: Draw | None = None
    """In place of the job's, as `make_algorithm`."""
    _scored: dict[str, Scores] = field(default_factory=dict)
    _noted: bool = False

    def __post_init__(self) -> None:
        threads = self.setup.job.simulation.threads
        if threads:
            torch.set_num_threads(threads)
        self.model: TunableModel = self.base or self.setup.fresh_model()
        settings = self.setup.job.simulation
        require_device(settings)
        keeps = method_of(self.setup.job).keeps
        self.kept = Kept(self.run.clients, keeps(self.setup.spec.schema)) if keeps else None
        self.worker = Worker(
            self.setup.job,
            self.setup.spec,
            self.model,
            self.setup.encoder,
            lambda: open_bundle(self.run.bundle),
            settings.device,
            self.kept,
        )
        self.features = FeatureStore(*_room(settings, self.run.path))

    def rounds(self) -> None:
        """Runs what is left of the rounds on the job's engine."""
        job, done = self.setup.job, self.run.newest()
        if self.kept is not None:
            self.run.require_kept()
        if done and done.unfinished is None and done.state.round >= job.federation.rounds:
            return
        deadline = job.federation.deadline if self.fleet is None else WEEK
        simulated = Simulated(
            job.simulation,
            self.run_over,
            self.answer,
            partial(answer_in, str(self.run.path)),
            self.worker,
            self._trainer,
            self.setup.store.train,
            partial(make_server_app, deadline=deadline),
            make_client_app,
        )
        try:
            ENGINES[job.simulation.engine].run(simulated)
        finally:
            self.features.close()

    def run_over(self, ask: Exchange) -> None:
        """The rounds on whatever answers, with the effects of the job's devices around it."""
        if self.fleet is None:
            run_rounds(self.coordinator(ask), ask)
        else:
            ask = self.fleet.around(ask)
            run_rounds(self.coordinator(ask), ask, self.fleet.gather)

    @cached_property
    def fleet(self) -> Fleet | None:
        return make_fleet(self.setup)

    def limits(self, client: str) -> Limits:
        """What this client can bear."""
        return AS_THE_JOB if self.fleet is None else self.fleet.limits(client)

    def assigned(self, client: str, round: int) -> tuple[str, ...] | None:
        """The tensors that this client trains in a round; None: all.

        Where blocks are chosen by scores: by those of the last probe.
        """
        job, schema, limits = self.setup.job, self.setup.spec.schema, self.limits(client)
        if job.units.probes:
            newest = self.run.newest()
            return tensors_of(schema, by_common_scores(job, schema, newest.state, limits)) if newest else None
        return tensors_of(schema, selected(job, schema, round, limits.blocks))

    def answer(self, packet: bytes, client: str) -> bytes:
        return self.worker.handle(packet, client, self.setup.store.train(client))

    def _trainer(self, names: tuple[str, ...] | None = None, rank: int = 0) -> CohortTrainer | None:
        """What trains these tensors (None: all) of clients of this rank (0: adapter.rank) together; None,
        with a word to whoever watches, where this base does not allow it.
        """
        setup = self.setup
        if setup.job.edge.mode == "forward":
            return None
        bundle = self.worker.open()
        start = bundle.initial if bundle.ranks is None else bundle.ranks.leading(bundle.initial, rank)
        rows = setup.split.train.rows[:TRIAL]
        sample = setup.store.stream(rows).take(np.arange(len(rows)))
        spec = at_rank(setup.spec, rank)
        spec = replace(spec, trainable=tuple(t for t in spec.trainable if names is None or t.name in names))
        try:
            with self.worker.at(rank) as parameters, only(parameters, names) as chosen:
                write(parameters, start)
                return open_trainer(
                    self.model,
                    chosen,
                    spec,
                    setup.encoder,
                    setup.job.federation,
                    start,
                    sample,
                    self.features,
                    ever(setup.job, setup.schema),
                )
        except NotStackable as e:
            if not self._noted:  # once, not for all that other rounds train
                self.watch.note(
                    "clients are trained one after another, as this base does not let "
                    f"them be trained together: {e}"
                )
            self._noted = True
            return None

    def coordinator(self, exchange: Exchange) -> Coordinator:
        """Opens or makes the bundle (asking clients for gradients where the job says so) and stands
        at the newest checkpoint.
        """
        job = self.setup.job
        plan, begun = plan_of(job, len(self.setup.split.clients)), self.run.start()
        traffic = Traffic(**(begun or {}))
        if begun is not None and self.fleet is not None:
            self.fleet.recall(traffic)
        if begun is not None or (
            (self.run.bundle / "manifest.json").exists() and self.run.newest() is not None
        ):
            bundle = open_bundle(self.run.bundle)
        else:
            frame, first, traffic = self._make_frame(exchange, plan)
            bundle = make_bundle(self.setup, self.run.bundle, frame, self.model, first)
        coordinator = start(
            job,
            self.run,
            bundle.schema,
            bundle.frame_digest,
            bundle.frame_bytes,
            make_algorithm(
                job, bundle.schema, self.limits, len(self.setup.split.clients), self.rule, self.draw
            ),
            self.setup.store.clients,
            lambda: bundle.start,
            self.evaluate,
            traffic,
            plan,
        )
        follow(coordinator, self.watch)
        left = job.federation.rounds - coordinator.state.round
        self.watch.stage("training", left * job.federation.cohort)
        return coordinator

    def evaluate(self, round: int, arrays: Arrays) -> Metrics | None:
        """Held-out metrics over all clients, in the rounds the job evaluates."""
        job = self.setup.job
        if not evaluated(job, round):
            return None
        whole = round == job.federation.rounds or not job.evaluation.max_examples
        metrics = self.scores(arrays, whole).metrics()
        return (
            with_personal(
                metrics, [scores.metrics() for _, _, scores in self.personal_scores(round, arrays, whole)]
            )
            if method_of(job).personal
            else metrics
        )

    def personal_scores(
        self, round: int, arrays: Arrays, whole: bool = True
    ) -> Iterator[tuple[int, np.ndarray, Scores]]:
        """Of each client that has something of its own to predict with after this round, and held-out
        examples: its place, those examples' places in `held_out` (or in the sample for the rounds between),
        and what it makes of them. In the order of the split.
        """
        if self.kept is None:
            return
        parts = self.setup.split
        taken = np.arange(len(parts.held_out.rows)) if whole else self._drawn
        ends = np.searchsorted(taken, parts.held_out.offsets)
        scored = (parts.clients[place] for place in np.flatnonzero(np.diff(ends)).tolist())
        for name in self.kept.clients(scored, round):
            place = parts.clients.place(name)
            index = np.arange(*ends[place : place + 2])
            own = personal_model(self.worker.open(), self.kept, arrays, name, round)
            if own is not None:
                yield (
                    place,
                    index,
                    self.worker.scores(own, self.setup.store.stream(parts.held_out.rows[taken[index]])),
                )

    def scores(self, arrays: Arrays, whole: bool = True) -> Scores:
        """Held-out scores per example of `held_out`, or of the sample for the rounds between."""
        key = digest(arrays) if whole else ""
        if key and key in self._scored:
            return self._scored[key]
        data = self.held_out if whole else self._sample
        scores = self.worker.scores(method_of(self.setup.job).shared(arrays), data)
        self._scored = {key: scores} if key else self._scored  # the last round's evaluation is the final one
        return scores

    @cached_property
    def held_out(self) -> Stream:
        """All clients' held-out examples in the order of split.held_out.rows, kept only where every
        evaluation takes them all.
        """
        keep = 0 if self.setup.job.evaluation.max_examples else CACHE_BYTES
        return self.setup.store.stream(self.setup.split.held_out.rows, keep)

    @cached_property
    def _sample(self) -> Stream:
        """`evaluation.max-examples` of them, drawn by the seed."""
        return self.setup.store.stream(self.setup.split.held_out.rows[self._drawn], CACHE_BYTES)

    @cached_property
    def _drawn(self) -> np.ndarray:
        """The places of the sample in split.held_out.rows, ascending."""
        count, rng = (
            len(self.setup.split.held_out.rows),
            generator(self.setup.job.federation.seed, "evaluation"),
        )
        return np.sort(
            rng.choice(count, size=min(self.setup.job.evaluation.max_examples, count), replace=False)
        )

    def _make_frame(self, exchange: Exchange, plan: PrivacyPlan | None) -> tuple[Arrays, Arrays, Traffic]:
        job = self.setup.job
        if not job.adapter.asks_gradients:
            self.watch.stage("making the frame", 0)
            return data_free_frame(self.setup, self.model), {}, Traffic()
        self.watch.stage(f"asking {job.adapter.init_clients} clients for the gradient of the first step", 0)
        gradients, traffic = gather_gradients(
            job,
            self.setup.spec,
            self.run,
            self.fleet.available(0) if self.fleet else self.setup.store.clients,
            exchange,
            plan,
        )
        self.run.keep_start(traffic.dump())
        frame, first = frames.from_gradients(self.setup.spec, gradients, job.adapter.init_step)
        return frame, first, traffic


@lru_cache(maxsize=1)
def _remote(path: str) -> Simulation:
    run = open_run(Path(path))
    torch.set_num_threads(run.job().simulation.threads or 1)
    return Simulation(open_setup(run.job()), run)


def answer_in(path: str, packet: bytes, client: str) -> bytes:
    """In a worker process of the ray engine: opens the run once, then answers from memory."""
    return _remote(path).answer(packet, client)
