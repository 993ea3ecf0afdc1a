"""What example-level privacy costs: a private step against a plain one, fedtune's engines and Opacus,
on the same model and batches.

    python benchmarks/privacy_cost.py [--clients 20] [--batch 8] [--blocks 7] [--quick] [--json]

MiniLM with rank-16 cores on all linears of its blocks, real texts with their real lengths. A step is one
optimizer step of every client: forward, backward, (gradients by example, clip, noise), AdamW. The pairs share
everything but the privacy:

    vectorised   fedtune's cohort trainer, all clients together: plain,
                 and with gradients by example from the thin factors
    serial       fedtune's loop, one client after another: plain, and with Opacus' gradients by example
    Opacus       its own GradSampleModule and DPOptimizer around the same model, one client after another

Blocks alternate; a figure is the median of the blocks. Target: vectorised, private over plain, at most 1.3.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from contenders.work import open_case
from rich.console import Console
from rich.table import Table

from fedtune.adapters.methods import attach, initial, write
from fedtune.privacy.example import ExamplePrivacy
from fedtune.privacy.noise import SystemNoise
from fedtune.training.chunks import Task
from fedtune.training.features import FeatureStore
from fedtune.training.local import make_optimizer, step, to_batch
from fedtune.training.private import PerExample, train_privately
from fedtune.training.together import open_trainer
from fedtune.workflows.setup import data_free_frame

TARGET = 1.3
CLIP, MULTIPLIER = 0.5, 1.0


class Work:
    """The model with its adapter, and one batch of each client."""

    def __init__(self, clients: int, batch: int) -> None:
        self.setup = open_case("a", clients)
        self.fed = self.setup.job.federation.model_copy(update={"batch_size": batch, "local_steps": 1})
        self.model = self.setup.fresh_model()
        frame = data_free_frame(self.setup, self.model)
        self.start = initial(self.model, self.setup.spec, {}, 0)
        self.parameters = attach(self.model, self.setup.spec, frame)
        self.data = [self.setup.store.train(name) for name in self.setup.split.clients[:clients]]
        rng = np.random.default_rng(0)
        self.batches = [np.sort(rng.choice(len(d), min(batch, len(d)), replace=False)) for d in self.data]
        self.settings = ExamplePrivacy(CLIP, MULTIPLIER, float(batch), 1.0, 1)
        sample = self.setup.store.stream(self.setup.split.train.rows[:6]).take(np.arange(6))
        self.trainer = open_trainer(
            self.model,
            self.parameters,
            self.setup.spec,
            self.setup.encoder,
            self.fed,
            self.start,
            sample,
            FeatureStore(0, None),
        )
        self.flat = np.concatenate([self.start[t.name].ravel() for t in self.setup.spec.trainable])
        self.gradients = PerExample(self.model, self.parameters)
        self.gradients(*to_batch(self.data[0], self.batches[0], self.setup.encoder))  # tries Opacus, once

    def together(self, private: bool) -> None:
        tasks = [
            Task(str(i), d, [b], noise=SystemNoise()) for i, (d, b) in enumerate(zip(self.data, self.batches))
        ]
        self.trainer.train(self.flat, tasks, 1, self.settings if private else None)

    def serial(self, private: bool) -> None:
        for data, index in zip(self.data, self.batches):
            write(self.parameters, self.start)
            if private:  # of the batch alone, each example of it with chance 1
                train_privately(
                    self.gradients,
                    data.take(index),
                    self.setup.encoder,
                    self.fed,
                    self.settings,
                    1,
                    SystemNoise(),
                )
            else:
                step(
                    self.model,
                    make_optimizer(self.parameters, self.fed, 1),
                    *to_batch(data, index, self.setup.encoder),
                )

    def opacus(self) -> None:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        wrapped = GradSampleModule(self.model, strict=False, loss_reduction="mean")
        linears = {m: m.training for m in self.model.modules() if isinstance(m, torch.nn.Linear)}
        for m in linears:
            m.training = True  # its hooks need it; dropout stays off
        try:
            for data, index in zip(self.data, self.batches):
                write(self.parameters, self.start)
                optimizer = DPOptimizer(
                    make_optimizer(self.parameters, self.fed, 1),
                    noise_multiplier=MULTIPLIER,
                    max_grad_norm=CLIP,
                    expected_batch_size=len(index),
                )
                batch, labels = to_batch(data, index, self.setup.encoder)
                torch.nn.functional.cross_entropy(wrapped(**batch), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        finally:
            wrapped.remove_hooks()
            for m, before in linears.items():
                m.training = before


def measure(ways: dict[str, Callable[[], None]], blocks: int) -> dict[str, list[float]]:
    """Seconds of each way, block by block, in turns; a first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(blocks + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if block:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few clients, one block: shows that it runs")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    chosen = parser.parse_args()
    clients, blocks = (2, 1) if chosen.quick else (chosen.clients, chosen.blocks)
    warnings.filterwarnings("ignore", "Full backward hook")
    work, console = Work(clients, chosen.batch), Console()
    seconds = measure(
        {
            "vectorised, plain": lambda: work.together(False),
            "vectorised, private": lambda: work.together(True),
            "serial, plain": lambda: work.serial(False),
            "serial, private": lambda: work.serial(True),
            "Opacus, private": work.opacus,
        },
        blocks,
    )
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    plain = {
        "vectorised, private": "vectorised, plain",
        "serial, private": "serial, plain",
        "Opacus, private": "serial, plain",
    }
    table = Table(
        title=(
            f"a step of {clients} clients, {chosen.batch} texts each; medians of {blocks} blocks; "
            f"{torch.get_num_threads()} threads"
        )
    )
    for header in ("", "ms a step", "over its plain step", "all ms"):
        table.add_column(header)
    for name, value in middle.items():
        ratio = f"{value / middle[plain[name]]:.2f}" if name in plain else ""
        table.add_row(name, f"{1000 * value:.0f}", ratio, " ".join(f"{1000 * s:.0f}" for s in seconds[name]))
    console.print(table)
    found = middle["vectorised, private"] / middle["vectorised, plain"]
    console.print(
        f"vectorised, private over plain: {found:.2f}, at most {TARGET}: "
        f"{'met' if found <= TARGET else 'missed'}"
    )
    if chosen.json:
        target = {
            "name": "vectorised, private over plain",
            "value": found,
            "target": f"at most {TARGET}",
            "met": found <= TARGET,
        }
        print(json.dumps({"targets": [target], "seconds": seconds}))


if __name__ == "__main__":
    main()
