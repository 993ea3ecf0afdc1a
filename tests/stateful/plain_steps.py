"""Rounds as one would write them on a page, for the tests of each method: no messages, no coordinator, no
stores, plain SGD with its terms as a loss.
"""

import numpy as np
import torch

from fedtune.adapters.methods import attach, initial
from fedtune.common.seeds import generator
from fedtune.round.batches import local_batches
from fedtune.training.local import to_batch
from fedtune.workflows.setup import data_free_frame, open_setup

SGD = (
    "federation.optimizer=sgd",
    "federation.lr=0.2",
    "federation.local-epochs=2",
    "simulation.engine=serial",
)


class Plain:
    """A base with its adapter on it. `first`: the trained tensors before round 1, by name."""

    def __init__(self, job):
        self.setup, self.fed = open_setup(job), job.federation
        self.model = self.setup.fresh_model()
        frame = data_free_frame(self.setup, self.model)
        self.first = initial(self.model, self.setup.spec, {}, self.fed.seed)
        self.parameters = attach(self.model, self.setup.spec, frame)

    def cohort(self, round):
        drawn = generator(self.fed.seed, "cohort", round).choice(
            len(self.setup.split.clients), self.fed.cohort, replace=False
        )
        return [self.setup.split.clients[place] for place in sorted(drawn)]

    def size(self, name):
        return len(self.setup.store.train(name))

    def losses(self, name, round, purpose="local"):
        """For each step of a client's round, the function from nothing to the mean loss of its batch."""
        data = self.setup.store.train(name)
        for index in local_batches(
            data.lengths,
            self.fed.batch_size,
            self.fed.local_epochs,
            0,
            generator(self.fed.seed, purpose, round, name),
        ):
            inputs, labels = to_batch(data, index, self.setup.encoder)
            yield lambda inputs=inputs, labels=labels: torch.nn.functional.cross_entropy(
                self.model(**inputs), labels
            )

    def walk(self, start, name, round, purpose="local", term=lambda n, p: 0.0, uphill=0.0, moving=None):
        """(where the steps from `start` end, how many there were). term: what of a tensor is added to the
        loss. moving: by what gradients are multiplied.
        """
        lr, steps, ps = self.fed.lr * self.fed.lr_decay ** (round - 1), 0, list(self.parameters.values())
        for n, p in self.parameters.items():
            p.data = torch.from_numpy(np.array(start[n], np.float32))
        for loss in self.losses(name, round, purpose):
            gradients = torch.autograd.grad(loss(), ps)
            if uphill:
                length = float(torch.cat([g.ravel() for g in gradients]).norm())
                before = [p.data.clone() for p in ps]
                for p, g in zip(ps, gradients):
                    p.data = p.data + uphill * g / length
                gradients = torch.autograd.grad(loss(), ps)
                for p, was in zip(ps, before):
                    p.data = was
            terms = torch.autograd.grad(
                sum(term(n, p) + 0.0 * p.sum() for n, p in self.parameters.items()), ps
            )
            for n, g, more in zip(self.parameters, gradients, terms):
                p, m = self.parameters[n], 1.0 if moving is None else torch.from_numpy(moving[n])
                p.data = p.data - lr * m * (g + more)
            steps += 1
        return {n: p.detach().numpy().copy() for n, p in self.parameters.items()}, steps

    def mean(self, updates, weights):
        return {
            n: (sum(w * u[n].astype(np.float64) for w, u in zip(weights, updates)) / sum(weights)).astype(
                np.float32
            )
            for n in updates[0]
        }

    def right(self, values, rows):
        """How many held-out examples (rows of the data set) a model with these values gets right."""
        for n, p in self.parameters.items():
            p.data = torch.from_numpy(np.array(values[n], np.float32))
        examples = self.setup.dataset.examples
        found = 0
        for row in rows.tolist():
            batch = self.setup.encoder.collate(self.setup.encoder.encode([examples.inputs[row]]))
            with torch.no_grad():
                found += (
                    int(self.model(**{k: torch.from_numpy(v) for k, v in batch.items()}).argmax())
                    == examples.labels[row]
                )
        return found


def near(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)
