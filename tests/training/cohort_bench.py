"""Five clients of a small base, as the cohort trainer takes them and as the serial engine's own loop does."""

from dataclasses import replace

import numpy as np

from fedtune.adapters.methods import attach, initial, write
from fedtune.common.seeds import generator
from fedtune.data.encoded import ClientData
from fedtune.round.batches import local_batches, trainable_batches
from fedtune.tasks import task_named
from fedtune.training.chunks import Task
from fedtune.training.features import FeatureStore
from fedtune.training.local import train_locally
from fedtune.training.together import open_trainer
from fedtune.workflows.setup import data_free_frame, open_setup

SETTINGS = (
    "federation.batch-size=3",
    "federation.local-epochs=2",
    "federation.cohort=1",
    "data.clients=1",
    "data.partition=iid",
)
SIZES = (7, 1, 0, 12, 5)


class Bench:
    """A base with its adapter, and five clients: of 7, 1, 0, 12 and 5 examples."""

    def __init__(self, job, units=None):
        self.job, self.setup = job, open_setup(job)
        self.model = self.setup.fresh_model()
        frame, spec = data_free_frame(self.setup, self.model), self.setup.spec
        self.spec = replace(
            spec, trainable=tuple(t for t in spec.trainable if units is None or t.unit in units)
        )
        self.start = initial(self.model, self.spec, {}, 0)
        self.parameters = attach(self.model, self.spec, frame)
        everything = self.setup.store.train(self.setup.split.clients[0])
        self.clients, begin = {}, 0
        for place, size in enumerate(SIZES):
            part = slice(begin, begin + size)
            self.clients[f"c{place}"] = ClientData(everything.encoded[part], everything.labels[part])
            begin += size

    @property
    def trainable(self):
        return self.spec.trainable

    def flat(self, arrays):
        return np.concatenate([arrays[t.name].ravel() for t in self.trainable])

    def batches(self, name):
        data, fed = self.clients[name], self.job.federation
        return trainable_batches(
            data,
            list(
                local_batches(
                    data.lengths,
                    fed.batch_size,
                    fed.local_epochs,
                    fed.local_steps,
                    generator(0, "local", 2, name),
                )
            ),
            task_named(self.job.model.task),
        )

    def tasks(self, trained=None):
        return [
            Task(name, data, self.batches(name), (trained or {}).get(name))
            for name, data in self.clients.items()
        ]

    def trainer(self, features=2**20, folder=None, chunk=0):
        found = open_trainer(
            self.model,
            self.parameters,
            self.spec,
            self.setup.encoder,
            self.job.federation,
            self.start,
            self.clients["c3"],
            FeatureStore(features, folder),
        )
        found.chunk = chunk or found.chunk
        return found

    def one_by_one(self, trained=None):
        """[clients, P] and [clients, 3] from the serial engine's own loop."""
        models, totals = [], []
        for name, data in self.clients.items():
            write(self.parameters, self.start)
            chosen = {
                n: p
                for n, p in self.parameters.items()
                if (trained or {}).get(name) is None or n in trained[name]
            }
            metrics = train_locally(
                self.model,
                chosen,
                data,
                self.setup.encoder,
                self.job.federation,
                2,
                generator(0, "local", 2, name),
            )
            models.append(self.flat({n: p.detach().numpy().copy() for n, p in self.parameters.items()}))
            totals.append([metrics["loss"][0], metrics["accuracy"][0], metrics["loss"][1]])
        return np.stack(models), np.array(totals)


def agree(found, expected, atol=2e-5):
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=atol)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-4)
