"""fedtune edge: what its commands print and refuse, and that nothing of it needs torch."""

import csv
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

from fedtune.adapters.methods import attach, write
from fedtune.cli.main import app
from fedtune.models.load import load_encoder, load_model
from fedtune.models.sources import locate

TEXTS = ["the film was lovely", "a dull and awful book", "quite fine"]


@pytest.fixture(scope="module")
def adapter(prepared, tmp_path_factory):
    """Trained values as an export leaves them."""
    folder, draw = tmp_path_factory.mktemp("adapter"), np.random.default_rng(0)
    save_file(
        {
            n: a + draw.normal(0, 0.1, a.shape).astype(np.float32)
            for n, a in prepared().bundle.initial.items()
        },
        folder / "adapter.safetensors",
    )
    return folder


def edge(*arguments, given=None):
    return CliRunner().invoke(
        app, ["edge", *map(str, arguments)], input=given, env={"COLUMNS": "500", "NO_COLOR": "1"}
    )


def rows(text):
    return [
        (row["input"], row["label"], float(row["probability"])) for row in csv.DictReader(io.StringIO(text))
    ]


def test_labels_are_those_of_torch(prepared, adapter, tmp_path):
    from safetensors.numpy import load_file

    made, out = prepared(), tmp_path / "out.csv"
    done = edge("predict", made.graphs, *TEXTS, "--adapter", adapter, "--out", out)
    assert done.exit_code == 0, done.output
    job, source = made.bundle.job, locate(made.bundle.job.model.source)
    model, encoder = load_model(job.model, source, 2, job.federation.seed), load_encoder(job.model, source)
    write(
        attach(model, made.bundle.manifest.spec, made.bundle.frame),
        load_file(adapter / "adapter.safetensors"),
    )
    with torch.inference_mode():
        expected = torch.softmax(
            model(**{k: torch.from_numpy(v) for k, v in encoder.collate(encoder.encode(TEXTS)).items()}), 1
        ).numpy()
    for (text, label, probability), given, chances in zip(
        rows(out.read_text()), TEXTS, expected, strict=True
    ):
        assert (text, label) == (given, ("bad", "good")[chances.argmax()]) and probability == pytest.approx(
            chances.max(), abs=1e-4
        )


def test_texts_files_and_standard_input_are_labelled_alike(prepared, adapter, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    file = adapter / "adapter.safetensors"
    given = [
        edge("predict", prepared().graphs, *way, "--adapter", file, given="\n".join(TEXTS) + "\n\n")
        for way in (TEXTS, ["--file", tmp_path / "in.txt"], ["-"])
    ]
    assert [one.exit_code for one in given] == [0, 0, 0] and given[0].output == given[1].output == given[
        2
    ].output
    assert len(given[0].output.splitlines()) == 3
    empty = edge("predict", prepared().graphs, "-", "--adapter", file, given="\n")
    assert empty.exit_code == 2 and "standard input holds no line" in empty.output


def test_mistakes_are_one_line(prepared, adapter, tmp_path):
    graphs, other = prepared().graphs, tmp_path / "adapter.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, other)
    (tmp_path / "framed").mkdir()
    (tmp_path / "framed" / "adapter.safetensors").write_bytes((adapter / "adapter.safetensors").read_bytes())
    (tmp_path / "framed" / "adapter.json").write_text('{"frame_sha256": "%s"}' % ("ab" * 32))
    for arguments, message in [
        (("predict", graphs, "x"), "holds graphs for training, which need trained values; give --adapter"),
        (
            ("predict", graphs, "x", "--adapter", adapter, "--int8"),
            "--int8: training graphs have no int8 form",
        ),
        (("predict", graphs, "x", "--adapter", other), "holds 1 tensors, the graph takes"),
        (("predict", graphs, "x", "--adapter", tmp_path / "framed"), "trained with the frame abababababab…"),
        (("predict", graphs, "x", "--adapter", tmp_path / "none"), "cannot be read"),
        (("predict", tmp_path, "x"), "no model.json in it"),
        (("predict", tmp_path, "x", "--adapter", adapter), "no model.json in it"),
        (
            ("predict", tmp_path, "x", "--adapter", adapter, "--static"),
            "--int8, --static, --adapter: each asks for another graph; give one of them",
        ),
        (("predict", graphs, "--adapter", adapter), "nothing to predict"),
        (("bench", "--graphs", tmp_path), "no edge.json, so no graphs for training"),
        (
            (
                "train",
                "--server",
                "127.0.0.1:9",
                "--insecure",
                "--dir",
                tmp_path,
                "--graphs",
                tmp_path,
                "--data",
                other,
            ),
            "no edge.json in it; give the folder that",
        ),
        (
            (
                "train",
                "--server",
                "example.org:9",
                "--insecure",
                "--dir",
                tmp_path,
                "--graphs",
                graphs,
                "--data",
                other,
            ),
            "--insecure to example.org: only 127.0.0.1",
        ),
    ]:
        done = edge(*arguments)
        assert (
            done.exit_code == 2
            and message in done.output
            and done.output.startswith("fedtune: ")
            and done.output.count("\n") == 1
        ), done.output


@pytest.mark.parametrize("name", ["train", "predict", "bench"])
def test_every_command_explains_itself(name):
    done = edge(name, "--help")
    assert done.exit_code == 0 and f"fedtune edge {name} " in done.output and "Examples:" in done.output


STEP = """
import sys
from pathlib import Path
from fedtune.bundles.bundle import open_bundle
from fedtune.edge.device import open_device
from fedtune.edge import service, bench
from fedtune.wire import encode
bundle = open_bundle(Path(sys.argv[1]))
device = open_device(bundle, Path(sys.argv[2]), Path(sys.argv[3]), 1, 500)
packet = encode("model", bundle.manifest.spec.schema, bundle.initial, round=1, frame=bundle.frame_digest)
assert device.handle(packet, "a") and device.evaluate(packet)
heavy = ("torch", "transformers", "onnx", "onnxscript", "opacus", "flwr")
print(*(name for name in heavy if name in sys.modules))
"""


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (
            "privacy.unit=example",
            "privacy.noise-multiplier=1",
            "privacy.clip=0.5",
            "privacy.examples=96",
            "federation.weighting=equal",
        ),
    ],
    ids=["plain", "private"],
)
def test_a_training_step_imports_no_torch(changes, prepared, tiny_csv):
    made = prepared("federation.local-steps=1", *changes)
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(made.bundle.folder), str(tiny_csv), str(made.graphs)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
