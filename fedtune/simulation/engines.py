"""The engines that a simulation can run on: ENGINES names those that a job can choose.

To add one: a file here that takes `Simulated` to its end, its line in ENGINES, and its name in the job's
simulation.engine.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedtune.data.encoded import ClientData
from fedtune.job import SimulationSection
from fedtune.round.replies import Exchange
from fedtune.simulation.flower import run_ray, run_serial
from fedtune.simulation.vectorised import Together
from fedtune.training.cohort import CohortTrainer
from fedtune.training.worker import Worker

Answer = Callable[[bytes, str], bytes]
"""(packet, client) -> what the client answers."""


@dataclass(frozen=True)
class Simulated:
    """What an engine runs: the rounds, and the clients that answer in them.

    Attributes:
        rounds: takes the run to its end over an exchange.
        answer: in this process.
        remote: the same in another process: it can be pickled.
        worker: holds the base in this process.
        trainer: as `Together.open`.
        data: a client's training examples.
        server, client: the Flower apps in which rounds run, and an answer is given.
    """

    settings: SimulationSection
    rounds: Callable[[Exchange], None]
    answer: Answer
    remote: Answer
    worker: Worker
    trainer: Callable[[tuple[str, ...] | None, int], CohortTrainer | None]
    data: Callable[[str], ClientData]
    server: Callable[[Callable[[Exchange], None]], ServerApp]
    client: Callable[[Answer], ClientApp]


@dataclass(frozen=True)
class Engine:
    """One engine. inside: clients train in the process of the rounds."""

    name: str
    run: Callable[[Simulated], None]
    inside: bool


def _vectorised(it: Simulated) -> None:
    it.rounds(Together(it.worker, it.settings, it.trainer, it.data))


def _serial(it: Simulated) -> None:
    run_serial(it.server(it.rounds), it.client(it.answer))


def _ray(it: Simulated) -> None:
    run_ray(it.server(it.rounds), it.client(it.remote), it.settings.workers)


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("vectorised", _vectorised, inside=True),
        Engine("serial", _serial, inside=True),
        Engine("ray", _ray, inside=False),
    )
}
