"""One client's step on some units: what is not assigned stays to the last bit, keeps nothing for the
backward pass, and costs no gradient.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cohort_bench import SETTINGS, Bench, agree

from fedtune.adapters.methods import read, write
from fedtune.training.features import FeatureStore
from fedtune.training.local import only, step, to_batch
from fedtune.training.private import PerExample
from fedtune.training.together import kept_bytes, open_trainer
from fedtune.wire import decode, encode

METHODS = ("fed-sb", "lora", "ffa-lora", "bias", "full")


def of_units(schema, *units):
    return tuple(t.name for t in schema.of_units(units))


@pytest.fixture(scope="module", params=METHODS)
def after_a_round(request, tiny_job, run_rounds, tmp_path_factory):
    return run_rounds(
        tiny_job(f"adapter.method={request.param}", "federation.rounds=1", "federation.lr=1e-3"),
        tmp_path_factory.mktemp("round") / "run",
    )


@pytest.mark.parametrize(
    "units", [("block.1", "head"), ("block.0", "head"), ("head",), ("block.0",)], ids=" ".join
)
def test_what_is_not_assigned_stays_to_the_last_bit(units, after_a_round):
    simulation = after_a_round
    worker, schema, client = simulation.worker, simulation.setup.schema, simulation.setup.split.clients[0]
    bundle, data = worker.open(), simulation.setup.store.train(client)
    model, names = simulation.run.newest().state.arrays, of_units(schema, *units)
    write(worker.parameters, {n: a + 1 for n, a in model.items()})  # of an earlier packet
    answer = worker.handle(
        encode("model", schema, model, round=1, frame=bundle.frame_digest, train=names), client, data
    )
    found = decode(answer, schema, kinds=["update"], round=1, frame=bundle.frame_digest)
    assert tuple(found.arrays) == names and found.header.weight == len(data)
    after = read(worker.parameters)
    for name in model:
        if name in names:
            np.testing.assert_array_equal(after[name], found.arrays[name])
        else:
            np.testing.assert_array_equal(after[name], model[name])
    assert any((found.arrays[n] != model[n]).any() for n in names)
    assert all(p.requires_grad and p.grad is None for p in worker.parameters.values())
    again = worker.handle(
        encode("model", schema, model, round=1, frame=bundle.frame_digest, train=names), client, data
    )
    assert again == answer


def test_the_values_are_those_of_an_optimizer_over_them_alone(tiny_job, run_rounds, tmp_path):
    """A whole gradient, of which the optimizer moves the assigned part."""
    simulation = run_rounds(
        tiny_job(
            "federation.rounds=1",
            "simulation.engine=serial",
            "federation.local-steps=1",
            "federation.batch-size=64",
        ),
        tmp_path / "run",
    )
    worker, schema, client = simulation.worker, simulation.setup.schema, simulation.setup.split.clients[0]
    data, model = simulation.setup.store.train(client), simulation.run.newest().state.arrays
    names = of_units(schema, "block.0")
    found, metrics = worker.train(model, client, data, 1, names)
    write(worker.parameters, model)
    optimizer = torch.optim.AdamW(
        [worker.parameters[n] for n in names], lr=simulation.setup.job.federation.lr, weight_decay=0
    )
    totals = step(worker.model, optimizer, *to_batch(data, np.arange(len(data)), worker.encoder))
    for name in names:
        np.testing.assert_allclose(found[name], worker.parameters[name].detach().numpy(), rtol=0, atol=1e-6)
    assert metrics["loss"] == (pytest.approx(float(totals[0]), rel=1e-5), len(data))


@pytest.mark.parametrize("method", ["fed-sb", "lora", "full"])
def test_a_backward_pass_ends_at_the_lowest_and_keeps_nothing_below(method, tiny_job):
    made = Bench(tiny_job(*SETTINGS, f"adapter.method={method}"))
    batch, labels = to_batch(made.clients["c3"], np.arange(8), made.setup.encoder)

    def kept(*units):
        with only(made.parameters, of_units(made.spec.schema, *units)), kept_bytes(made.model) as found:
            loss = made.model.loss(made.model(**batch), batch, labels)[0].sum()
            loss.backward()
            touched = {n for n, p in made.parameters.items() if p.grad is not None}
        return sum(found.values()), touched

    whole, _ = kept(*made.spec.schema.units)
    (low, lower), (high, upper), (head, last) = kept("block.0", "head"), kept("block.1", "head"), kept("head")
    assert head < high < 0.7 * low and low <= whole and head < 0.1 * whole
    for touched, units in ((lower, ("block.0", "head")), (upper, ("block.1", "head")), (last, ("head",))):
        assert touched <= set(of_units(made.spec.schema, *units)) and touched & set(
            of_units(made.spec.schema, units[0])
        )


def test_only_restores_what_it_changed_when_something_fails(tiny_job):
    made = Bench(tiny_job(*SETTINGS))
    names = of_units(made.spec.schema, "head")
    with pytest.raises(ZeroDivisionError), only(made.parameters, names) as chosen:
        assert tuple(chosen) == names and not any(
            p.requires_grad for n, p in made.parameters.items() if n not in names
        )
        raise ZeroDivisionError
    assert all(p.requires_grad for p in made.parameters.values())


@pytest.mark.parametrize("units", [("block.1", "head"), ("block.0",)], ids=" ".join)
def test_gradients_by_example_are_of_the_assigned_tensors(units, tiny_job):
    made = Bench(tiny_job(*SETTINGS))
    names = of_units(made.spec.schema, *units)
    batch, labels = to_batch(made.clients["c3"], np.arange(5), made.setup.encoder)
    whole = PerExample(made.model, made.parameters)(batch, labels)[0]
    with only(made.parameters, names) as chosen:
        part = PerExample(made.model, chosen)(batch, labels)[0]
    columns = np.repeat([t.name in names for t in made.trainable], [t.size for t in made.trainable])
    assert part.shape == (5, columns.sum())
    torch.testing.assert_close(part, whole[:, torch.from_numpy(columns)], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changing, unit", [((), "block.1"), (("block.0",), None), (("head",), "block.1")])
@pytest.mark.parametrize("chunk", [5, 10_000])
def test_a_cohort_on_some_units_is_one_by_one(changing, unit, chunk, tiny_job):
    """Values below the trained block are not the start's: the base in the trainer is as it was written."""
    made = Bench(tiny_job(*SETTINGS))
    names = of_units(made.spec.schema, "block.1", "head")
    made.start = {n: a + np.float32(0.05) for n, a in made.start.items()}
    expected = made.one_by_one(dict.fromkeys(made.clients, frozenset(names)))
    part = replace(made.spec, trainable=tuple(t for t in made.spec.trainable if t.name in names))
    write(made.parameters, made.start)
    with only(made.parameters, names) as chosen:
        trainer = open_trainer(
            made.model,
            chosen,
            part,
            made.setup.encoder,
            made.job.federation,
            made.start,
            made.clients["c3"],
            FeatureStore(2**20),
            changing,
        )
        trainer.chunk = chunk
        write(made.parameters, made.start)  # the trial wrote others
        models, totals = trainer.train(
            np.concatenate([made.start[n].ravel() for n in names]), made.tasks(), 2
        )
    columns = np.repeat([t.name in names for t in made.trainable], [t.size for t in made.trainable])
    agree((models, totals), (expected[0][:, columns], expected[1]))
    assert trainer.through.unit == unit
