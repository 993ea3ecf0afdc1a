"""What one client predicts with, taken out of a run: the adapter and graphs give the
accuracy that the run says.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.common.metrics import value
from fedtune.errors import RunError, UserError
from fedtune.onnx.predict import Predictor
from fedtune.workflows.export import export_client

DITTO = ("personal.method=ditto", "federation.lr=0.1")


@pytest.mark.parametrize(
    "changes",
    [
        ("personal.method=select", "personal.every=1", "federation.lr=0.1"),
        ("personal.method=loge", "federation.lr=0.1"),
    ],
    ids=["select", "loge"],
)
def test_it_is_what_the_client_is_scored_with(changes, tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(
        tiny_job(*changes, "federation.rounds=2", "export.onnx=true", "export.int8=false"), tmp_path / "run"
    )
    split, examples, labels = (
        simulation.setup.split,
        simulation.setup.dataset.examples,
        simulation.setup.dataset.label_names,
    )
    shared = simulation.run.newest().state.arrays
    for place, index, scores in list(simulation.personal_scores(2, shared))[:1]:
        folder = tmp_path / split.clients[place]
        exports = export_client(simulation.run, split.clients[place], folder, simulation.setup)
        assert {p.name for p in folder.iterdir()} == {"adapter", "onnx"} and exports["float32"]["of"] == len(
            index
        )
        found = examples.take(split.held_out[place])
        said, _ = Predictor.open(folder / "onnx").predict(list(found.inputs))
        accuracy = np.mean([labels[label] == name for label, name in zip(found.labels, said)])
        assert (
            accuracy
            == pytest.approx(value(scores.metrics(), "accuracy"))
            == pytest.approx(exports["float32"]["accuracy"])
        )
        own = load_file(folder / "adapter" / "adapter.safetensors")
        assert own.keys() == {t.name for t in simulation.setup.spec.trainable}
        assert any((own[name] != array).any() for name, array in shared.items())
    with pytest.raises(UserError, match=r"already exists and is not empty; choose another"):
        export_client(simulation.run, split.clients[place], folder, simulation.setup)


def test_what_cannot_be_exported_says_why(tiny_job, run_rounds, tmp_path):
    plain = run_rounds(tiny_job("federation.rounds=1"), tmp_path / "plain")
    ditto = run_rounds(tiny_job(*DITTO, "federation.rounds=1", "federation.cohort=2"), tmp_path / "ditto")
    met = {name for line in ditto.run.metrics() for name in line["clients"]}
    silent = next(name for name in ditto.setup.split.clients if name not in met)
    for simulation, client, message in (
        (
            plain,
            silent,
            (
                r'personal\.method = "none", so all clients predict with the global model; '
                r"export it without --client"
            ),
        ),
        (ditto, "nobody", r"--client nobody: the run has no such client; its 6 are called .*, …, .*"),
        (
            ditto,
            silent,
            (
                rf"--client {silent}: took part in none of the 1 rounds, so it has nothing "
                r"of its own; name one that did"
            ),
        ),
    ):
        with pytest.raises(UserError, match=message):
            export_client(simulation.run, client, tmp_path / "out", simulation.setup)
    client = next(iter(met))
    (tmp_path / "file").write_text("")
    for out, message in (
        (
            ditto.run.path / "onnx",
            r"--out .*: lies in the run folder, whose own exports would take its place; choose another",
        ),
        (tmp_path / "file" / "x", r"--out .*: file is a file; choose another"),
        (tmp_path / ("n" * 300), r"cannot write .*: File name too long; choose another place"),
        (tmp_path / "file", "already exists and is not empty"),
    ):
        with pytest.raises(UserError, match=message):
            export_client(ditto.run, client, out, ditto.setup)
    with pytest.raises(UserError, match="has no such client"):
        export_client(ditto.run, client.rpartition("-")[0] + "-" + "9" * 5000, tmp_path / "out", ditto.setup)
    ditto.run.clients.rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"clients: what clients keep is missing; restore it"):
        export_client(ditto.run, client, tmp_path / "out", ditto.setup)
    assert not (tmp_path / "out").exists()


def test_the_command_needs_both_and_writes_there(tiny_job, run_rounds, tmp_path):
    run = run_rounds(tiny_job(*DITTO, "federation.rounds=1", "federation.cohort=6"), tmp_path / "run").run
    (first, *_), card = run.metrics()[-1]["clients"], sorted(p.name for p in run.path.iterdir())
    for wrong in (["--client", first], ["--out", str(tmp_path / "x")]):
        done = CliRunner().invoke(app, ["export", str(run.path), *wrong])
        assert done.exit_code == 2 and "go together" in done.stderr
    done = CliRunner().invoke(
        app, ["export", str(run.path), "--client", first, "--out", str(tmp_path / "a" / "own"), "--json"]
    )
    assert done.exit_code == 0 and json.loads(done.stdout).keys() == {"adapter"}
    assert (
        load_file(tmp_path / "a" / "own" / "adapter" / "adapter.safetensors")
        and sorted(p.name for p in run.path.iterdir()) == card
    )
