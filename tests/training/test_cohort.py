"""Clients trained together end where each trained alone ends, whatever is ragged about them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtune.adapters.methods import attach, initial, write
from fedtune.seeds import generator
from fedtune.training.batches import local_batches
from fedtune.training.chunks import Task, trainable_batches
from fedtune.training.cohort import CohortTrainer
from fedtune.training.features import FeatureStore
from fedtune.training.local import ClientData, step, to_batch, train_locally
from fedtune.training.passes import Packed, Padded
from fedtune.training.together import open_trainer
from fedtune.workflows.setup import data_free_frame, open_setup

SIZES = (7, 1, 0, 12, 5)


class Bench:
    """A base with its adapter, and five clients: of 7, 1, 0, 12 and 5 examples."""

    def __init__(self, job, units=None):
        self.job, self.setup = job, open_setup(job)
        self.model = self.setup.fresh_model()
        frame, spec = data_free_frame(self.setup, self.model), self.setup.spec
        self.spec = replace(spec, trainable=tuple(t for t in spec.trainable if units is None or t.unit in units))
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
        return trainable_batches(data, list(local_batches(data.lengths, fed.batch_size, fed.local_epochs, fed.local_steps, generator(0, "local", 2, name))), self.job.model.task)

    def tasks(self, trained=None):
        return [Task(name, data, self.batches(name), (trained or {}).get(name)) for name, data in self.clients.items()]

    def trainer(self, features=2**20, folder=None, chunk=0):
        found = open_trainer(
            self.model, self.parameters, self.spec, self.setup.encoder, self.job.federation, self.start, self.clients["c3"], FeatureStore(features, folder))
        found.chunk = chunk or found.chunk
        return found

    def one_by_one(self, trained=None):
        """[clients, P] and [clients, 3] from the serial engine's own loop."""
        models, totals = [], []
        for name, data in self.clients.items():
            write(self.parameters, self.start)
            chosen = {n: p for n, p in self.parameters.items() if (trained or {}).get(name) is None or n in trained[name]}
            metrics = train_locally(self.model, chosen, data, self.setup.encoder, self.job.federation, 2, generator(0, "local", 2, name))
            models.append(self.flat({n: p.detach().numpy().copy() for n, p in self.parameters.items()}))
            totals.append([metrics["loss"][0], metrics["accuracy"][0], metrics["loss"][1]])
        return np.stack(models), np.array(totals)


@pytest.fixture
def bench(tiny_job):
    return lambda *changes, units=None: Bench(tiny_job("federation.batch-size=3", "federation.local-epochs=2", "federation.cohort=1", "data.clients=1", "data.partition=iid", *changes), units)


def agree(found, expected, atol=2e-5):
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=atol)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 20, 10_000])
@pytest.mark.parametrize("changes", [
    (), ("adapter.method=lora", "federation.optimizer=sgd"), ("adapter.method=bias", "federation.optimizer=sgd"), ("adapter.method=full", "federation.optimizer=sgd"), ("adapter.method=head",),
    ("federation.local-steps=2", "federation.weight-decay=0.1", "federation.lr-decay=0.5", "federation.head-lr=0.1")], ids=" ".join)
def test_a_ragged_cohort(changes, chunk, bench):
    made = bench(*changes)
    agree(made.trainer(chunk=chunk).train(made.flat(made.start), made.tasks(), 2), made.one_by_one())


@pytest.mark.parametrize("size", range(1, len(SIZES) + 1))
def test_every_block_size(size, bench):
    made = bench()
    trainer, tasks, start = made.trainer(), made.tasks(), made.flat(made.start)
    parts = [trainer.train(start, tasks[i : i + size], 2) for i in range(0, len(tasks), size)]
    agree([np.concatenate(column) for column in zip(*parts)], made.one_by_one())


def test_nobody(bench):
    made = bench()
    models, totals = made.trainer().train(made.flat(made.start), [], 1)
    assert models.shape == (0, made.setup.spec.size) and totals.shape == (0, 3)


@pytest.mark.parametrize("changes", [(), ("federation.optimizer=sgd", "federation.momentum=0.9"), ("federation.weight-decay=0.1",)], ids=" ".join)
def test_mixed_assignments(changes, bench):
    """Each client trains other units; what it does not train stays as it was to the last bit."""
    made = bench(*changes)
    units = {t.name: t.unit for t in made.trainable}
    trained = {
        "c0": frozenset(n for n, u in units.items() if u == "block.1"), "c1": frozenset(n for n, u in units.items() if u == "head"),
        "c3": frozenset(n for n, u in units.items() if u == "block.0"), "c4": None,
    }
    start = made.flat(made.start)
    found = made.trainer().train(start, made.tasks(trained), 2)
    agree(found, made.one_by_one(trained))
    moved = {t.name for t, a in zip(made.trainable, np.split(found[0][0] != start, np.cumsum([t.size for t in made.trainable])[:-1])) if a.any()}
    assert moved == trained["c0"]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("method", ["lora", "bias", "full"])
def test_causal_language_models(model, method, bench, request):
    """Loss by token; texts of one token predict nothing. A gpt2 has layers of its own kind: it is trained one by one, or where it can be, together."""
    from fedtune.errors import ModelError
    from fedtune.training.stacked import NotStackable

    changes = (f"model.source={request.getfixturevalue(model)}", "model.task=causal-lm", f"adapter.method={method}", "federation.optimizer=sgd", "federation.lr=0.05",
               "evaluation.baselines=[]")
    try:
        made = bench(*changes)
        made.clients["c4"].encoded[0]["input_ids"] = made.clients["c4"].encoded[0]["input_ids"][:1]
        trainer = made.trainer()
    except ModelError:
        assert (model, method) in {("tiny_gpt2", "lora"), ("tiny_llama", "bias")}
    except NotStackable as e:
        assert (model, method) != ("tiny_llama", "lora") and "cannot be stacked" in str(e)
    else:
        agree(trainer.train(made.flat(made.start), made.tasks(), 2), made.one_by_one())


@pytest.mark.parametrize("where", ["memory", "disk", "none", "little"])
@pytest.mark.parametrize("packed", [True, False])
def test_features_below_the_lowest_trained_block(where, packed, bench, tmp_path):
    """Only the upper block is trained: what the lower gives is kept, and nothing changes."""
    made = bench(units={"block.1", "head"})
    store = FeatureStore({"memory": 2**20, "disk": 2**20, "none": 0, "little": 5000}[where], tmp_path if where == "disk" else None)
    cpu = torch.device("cpu")
    through = Packed(made.model, "block.1", cpu) if packed else Padded(made.model, made.setup.encoder, "block.1", cpu)
    trainer = CohortTrainer(made.model, made.parameters, made.trainable, made.job.federation, through, store, 30)
    calls, below = [], through.below
    through.below = lambda encoded: calls.append(len(encoded)) or below(encoded)
    found = [trainer.train(made.flat(made.start), made.tasks(), 2) for _ in range(2)]
    expected = made.one_by_one()
    for one in found:
        agree(one, expected)
    if where in ("memory", "disk"):
        assert sum(calls) == sum(SIZES)  # each example once, though it was seen in two epochs of two rounds
    else:  # as often as it was seen; a first chunk shows that there is no room
        assert 4 * sum(SIZES) <= sum(calls) <= 4 * sum(SIZES) + 20
    store.close()
    assert not list(tmp_path.iterdir())


def test_the_way_through_is_found(bench, tiny_job):
    made = bench()
    assert isinstance(made.trainer().through, Packed) and made.trainer().through.unit is None
    assert bench("adapter.method=head").trainer().through.unit == "head"
    assert bench(units={"block.1"}).trainer().through.unit == "block.1"


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_step_is_opacus_step(bench):
    """Per-example gradients, cut and summed: against Opacus, which shares no code with ours, on the same batch."""
    opacus = pytest.importorskip("opacus")
    from fedtune.training.cohort import PerExample

    made = bench("federation.optimizer=sgd", "federation.lr=50.0", "federation.batch-size=12", "federation.local-steps=1", "federation.local-epochs=1")
    clip, start = 0.05, made.flat(made.start)
    private = PerExample(clip, 0.0, 12, torch.randn)
    trainer = made.trainer(chunk=25)
    found, loose = (trainer.train(start, made.tasks(), 1, one)[0] for one in (private, replace(private, clip=1e9)))
    assert np.abs(found - loose).max() > 0.1  # examples were cut
    for row, name in ((3, "c3"), (0, "c0"), (1, "c1")):
        write(made.parameters, made.start)
        made.model.train()
        wrapped = opacus.GradSampleModule(made.model, strict=False, loss_reduction="sum")
        for m in made.model.modules():
            m.training = isinstance(m, torch.nn.Linear) or m is made.model  # hooks need it; dropout stays off
        optimizer = opacus.optimizers.DPOptimizer(
            torch.optim.SGD(made.parameters.values(), lr=50.0), noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=12, loss_reduction="mean")
        (index,) = made.batches(name)
        batch, labels = to_batch(made.clients[name], index, made.setup.encoder)
        torch.nn.functional.cross_entropy(wrapped(**batch), labels, reduction="sum").backward()
        optimizer.step()
        wrapped.remove_hooks()
        made.model.eval()
        expected = made.flat({n: p.detach().numpy() for n, p in made.parameters.items()})
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=2e-5, err_msg=name)
        assert np.abs(found[row] - start).max() > 1e-3


def test_noise_has_its_size(bench):
    from fedtune.training.cohort import PerExample

    made = bench("federation.optimizer=sgd", "federation.lr=1.0", "federation.batch-size=12", "federation.local-steps=1")
    start, tasks, draw = made.flat(made.start), made.tasks(), torch.Generator().manual_seed(0)
    plain, noisy = (
        made.trainer().train(start, tasks, 1, PerExample(0.5, z, 12, lambda shape: torch.randn(shape, generator=draw)))[0] for z in (0.0, 3.0))
    spread = (noisy - plain)[[0, 1, 3, 4]]
    assert spread.std() == pytest.approx(3.0 * 0.5 / 12, rel=0.05)
    assert not (noisy - plain)[2].any()  # a client with no example makes no step


def test_step_is_what_the_loop_does(bench):
    """The serial twin's own step, by torch.optim, against one written out."""
    made = bench("federation.optimizer=sgd", "federation.lr=0.5")
    write(made.parameters, made.start)
    batch, labels = to_batch(made.clients["c3"], np.arange(4), made.setup.encoder)
    loss = torch.nn.functional.cross_entropy(made.model(**batch), labels)
    expected = [p.detach() - 0.5 * g for p, g in zip(made.parameters.values(), torch.autograd.grad(loss, list(made.parameters.values())))]
    step(made.model, torch.optim.SGD(made.parameters.values(), lr=0.5), batch, labels)
    for p, e in zip(made.parameters.values(), expected):
        torch.testing.assert_close(p.detach(), e)
