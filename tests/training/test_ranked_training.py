"""A client of a lower rank, against plain torch on slices of the frame,
and what stands there when it is done.
"""

import numpy as np
import pytest
import torch

from fedtune.adapters.methods import read, write
from fedtune.common.seeds import generator
from fedtune.errors import Refused
from fedtune.round.batches import local_batches
from fedtune.training.evaluate import score
from fedtune.training.local import to_batch
from fedtune.wire import decode, encode

CLASSES = 'simulation.devices=[{name = "small", rank = 2}, {name = "middle", rank = 3}, {name = "large"}]'


class Sliced(torch.nn.Module):
    """y = W x + s B[:, :r] R A[:r] x as the formula says it."""

    def __init__(self, base, a, b, scale, core):
        super().__init__()
        self.base, self.a, self.b, self.scale = (
            base,
            torch.from_numpy(a.copy()),
            torch.from_numpy(b.copy()),
            scale,
        )
        self.core = torch.nn.Parameter(torch.from_numpy(core.copy()))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T @ self.core.T @ self.b.T)


@pytest.fixture(scope="module")
def simulation(tiny_job, run_rounds, tmp_path_factory):
    job = tiny_job(
        CLASSES,
        "federation.rounds=1",
        "federation.cohort=6",
        "simulation.engine=serial",
        "federation.local-steps=2",
        "adapter.alpha=8.0",
        "federation.weight-decay=0.1",
    )
    return run_rounds(job, tmp_path_factory.mktemp("ranked") / "run")


def model_of(bundle):
    """A model of round 1 whose cores are nowhere 0, as it travels."""
    rng = np.random.default_rng(5)
    return bundle.ranks.split(
        {n: a + rng.normal(0, 0.1, a.shape).astype(np.float32) for n, a in bundle.initial.items()}
    )


def asked(bundle, rank, units=None, kind="model"):
    held = bundle.schema.held(rank)
    names = tuple(t.name for t in held.of_units(units or held.units))
    return names, encode(
        kind,
        bundle.schema,
        {t.name: model_of(bundle)[t.name] for t in held.tensors},
        round=1,
        frame=bundle.frame_digest,
        train=names,
    )


def plainly(simulation, rank, client, units):
    """The trained tensors of these units after the round, written as on a page."""
    setup, bundle = simulation.setup, simulation.worker.open()
    fed, spec = setup.job.federation, bundle.manifest.spec
    start = bundle.ranks.leading(bundle.ranks.join(model_of(bundle)), rank)
    model, data, trained = setup.fresh_model().requires_grad_(False), setup.store.train(client), {}
    for x in spec.linears:
        parent, _, child = x.name.rpartition(".")
        made = Sliced(
            model.linear(x.name),
            bundle.frame[f"{x.name}.A"][:rank],
            bundle.frame[f"{x.name}.B"][:, :rank],
            spec.scale,
            start[f"{x.name}.R"],
        )
        setattr(model.body.get_submodule(parent), child, made)
        trained[f"{x.name}.R"] = made.core
    for name, p in model.head.named_parameters():
        p.data, trained[f"head.{name}"] = torch.from_numpy(start[f"head.{name}"].copy()), p
    trained = {t.name: trained[t.name].requires_grad_(True) for t in spec.schema.of_units(units)}
    optimizer = torch.optim.AdamW(trained.values(), lr=fed.lr, weight_decay=fed.weight_decay)
    steps = 0
    for index in local_batches(
        data.lengths,
        fed.batch_size,
        fed.local_epochs,
        fed.local_steps,
        generator(fed.seed, "local", 1, client),
    ):
        inputs, labels = to_batch(data, index, setup.encoder)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**inputs), labels).backward()
        optimizer.step()
        steps += 1
    assert steps == 2
    return {name: p.detach().numpy() for name, p in trained.items()}


@pytest.mark.parametrize(
    "rank, units", [(2, ("block.0", "block.1", "head")), (3, ("block.1",)), (3, ("block.0", "head"))]
)
def test_two_steps_are_those_of_sliced_matrices(rank, units, simulation):
    worker, client = simulation.worker, simulation.setup.split.clients[1]
    bundle, data = worker.open(), simulation.setup.store.train(client)
    before = read(worker.parameters)
    names, packet = asked(bundle, rank, units)
    answer = worker.handle(packet, client, data)
    found = decode(answer, bundle.schema, kinds=["update"], round=1, frame=bundle.frame_digest)
    assert tuple(found.arrays) == names and found.header.weight == len(data)
    expected = plainly(simulation, rank, client, units)
    for name, piece in bundle.ranks.split(expected).items():
        np.testing.assert_allclose(found.arrays[name], piece, rtol=0, atol=2e-6, err_msg=name)
        assert np.abs(piece - model_of(bundle)[name]).max() > 1e-3
    # those of whole rank are as they were, but for the head, which is everybody's
    after = read(worker.parameters)
    assert all(np.array_equal(after[n], before[n]) for n in bundle.ranks.cores) and all(
        p.requires_grad for p in worker.parameters.values()
    )
    assert worker.handle(packet, client, data) == answer


def test_a_model_whose_outer_numbers_are_0_is_the_same_model(simulation):
    """What a client of a lower rank computes is the whole model with 0 where it has nothing."""
    worker, client = simulation.worker, simulation.setup.split.clients[0]
    bundle, data = worker.open(), simulation.setup.store.train(client)
    part = bundle.ranks.leading(bundle.ranks.join(model_of(bundle)), 2)
    whole = worker.metrics(bundle.ranks.split(bundle.ranks.whole(part)), data)
    with worker.at(2) as parameters:
        assert {parameters[name].shape for name in bundle.ranks.cores} == {(2, 2)}
        write(parameters, part)
        alone = score(worker.model, data, worker.encoder, 64).metrics()
    assert {name: value for name, (value, _) in alone.items()} == pytest.approx(
        {name: value for name, (value, _) in whole.items()}, rel=1e-5
    )
    assert whole["loss"] != worker.metrics(model_of(bundle), data)["loss"]


def test_a_packet_of_no_rank_of_the_job_is_refused(simulation):
    worker, client = simulation.worker, simulation.setup.split.clients[0]
    bundle, data = worker.open(), simulation.setup.store.train(client)
    some = {n: a for n, a in model_of(bundle).items() if not n.endswith(".R.3")}
    with pytest.raises(Refused, match=r"tensors: holds .* which are those of none of the ranks 2, 3, 4"):
        worker.handle(encode("model", bundle.schema, some, round=1, frame=bundle.frame_digest), client, data)
    first = next(t.name for t in bundle.schema.tensors)
    with pytest.raises(Refused, match="tensors: asks for a part of what a client of this rank has"):
        worker.handle(
            encode(
                "model", bundle.schema, model_of(bundle), round=1, frame=bundle.frame_digest, train=[first]
            ),
            client,
            data,
        )
