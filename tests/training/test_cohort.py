"""Clients trained together end where each trained alone ends, whatever is ragged about them."""

import numpy as np
import pytest
import torch
from cohort_bench import SETTINGS, SIZES, Bench, agree

from fedtune.adapters.methods import write
from fedtune.training.cohort import CohortTrainer
from fedtune.training.features import FeatureStore
from fedtune.training.local import step, to_batch
from fedtune.training.passes import Packed, Padded


@pytest.fixture
def bench(tiny_job):
    return lambda *changes, units=None: Bench(tiny_job(*SETTINGS, *changes), units)


@pytest.mark.parametrize("chunk", [1, 20, 10_000])
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("adapter.method=lora", "federation.optimizer=sgd"),
        ("adapter.method=ffa-lora", "federation.optimizer=sgd"),
        ("adapter.method=bias", "federation.optimizer=sgd"),
        ("adapter.method=full", "federation.optimizer=sgd"),
        ("adapter.method=head",),
        (
            "federation.local-steps=2",
            "federation.weight-decay=0.1",
            "federation.lr-decay=0.5",
            "federation.head-lr=0.1",
        ),
    ],
    ids=" ".join,
)
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


@pytest.mark.parametrize(
    "changes",
    [(), ("federation.optimizer=sgd", "federation.momentum=0.9"), ("federation.weight-decay=0.1",)],
    ids=" ".join,
)
def test_mixed_assignments(changes, bench):
    """Each client trains other units; what it does not train stays as it was to the last bit."""
    made = bench(*changes)
    units = {t.name: t.unit for t in made.trainable}
    trained = {
        "c0": frozenset(n for n, u in units.items() if u == "block.1"),
        "c1": frozenset(n for n, u in units.items() if u == "head"),
        "c3": frozenset(n for n, u in units.items() if u == "block.0"),
        "c4": None,
    }
    start = made.flat(made.start)
    found = made.trainer().train(start, made.tasks(trained), 2)
    agree(found, made.one_by_one(trained))
    moved = {
        t.name
        for t, a in zip(
            made.trainable, np.split(found[0][0] != start, np.cumsum([t.size for t in made.trainable])[:-1])
        )
        if a.any()
    }
    assert moved == trained["c0"]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("method", ["lora", "bias", "full"])
def test_causal_language_models(model, method, bench, request):
    """Loss by token; texts of one token predict nothing.

    A gpt2 has layers of its own kind: it is trained one by one, or where it can be, together.
    """
    from fedtune.adapters.layers.stacked import NotStackable
    from fedtune.errors import ModelError

    changes = (
        f"model.source={request.getfixturevalue(model)}",
        "model.task=causal-lm",
        f"adapter.method={method}",
        "federation.optimizer=sgd",
        "federation.lr=0.05",
        "evaluation.baselines=[]",
    )
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
    store = FeatureStore(
        {"memory": 2**20, "disk": 2**20, "none": 0, "little": 5000}[where],
        tmp_path if where == "disk" else None,
    )
    cpu = torch.device("cpu")
    through = (
        Packed(made.model, "block.1", cpu)
        if packed
        else Padded(made.model, made.setup.encoder, "block.1", cpu)
    )
    trainer = CohortTrainer(
        made.model, made.parameters, made.trainable, made.job.federation, through, store, 30
    )
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


def test_step_is_what_the_loop_does(bench):
    """The serial twin's own step, by torch.optim, against one written out."""
    made = bench("federation.optimizer=sgd", "federation.lr=0.5")
    write(made.parameters, made.start)
    batch, labels = to_batch(made.clients["c3"], np.arange(4), made.setup.encoder)
    loss = torch.nn.functional.cross_entropy(made.model(**batch), labels)
    expected = [
        p.detach() - 0.5 * g
        for p, g in zip(made.parameters.values(), torch.autograd.grad(loss, list(made.parameters.values())))
    ]
    step(made.model, torch.optim.SGD(made.parameters.values(), lr=0.5), batch, labels)
    for p, e in zip(made.parameters.values(), expected):
        torch.testing.assert_close(p.detach(), e)
