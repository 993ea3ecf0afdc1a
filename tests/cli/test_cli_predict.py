"""The commands export and predict: what they print, what they refuse, and that a device needs no torch."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fedtune.cli import export, predict
from fedtune.data.images import ImageEncoder
from fedtune.job import Job
from fedtune.models.base import TunableModel
from fedtune.onnx.export import export_graph
from fedtune.tasks import TASKS
from fedtune.workflows.summary import facts, write_summary

TEXTS = ["the film was lovely", "a dull and awful book", "quite fine"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_job: Callable[..., Job], run_rounds: Callable) -> Path:
    """A run that `fedtune export` exported."""
    path = tmp_path_factory.mktemp("runs") / "run"
    wanted = (
        "export.onnx=true",
        "export.int8=true",
        "export.peft=true",
        "report.html=false",
        "federation.rounds=1",
    )
    simulation = run_rounds(tiny_job(*wanted), path)
    write_summary(simulation.run, facts(simulation.run))
    export.command(path)
    return path


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An onnx folder whose model calls an image light or dark by its mean."""
    folder = tmp_path_factory.mktemp("light") / "onnx"
    body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(3, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]))
        head.bias.zero_()
    encoder = ImageEncoder(32)
    encoder.save(folder)
    model = TunableModel(_Pixels(body), TASKS["image-classification"], head).eval()
    export_graph(model, {"pixels": np.zeros((2, 3, 32, 32), np.float32)}, folder / "model.onnx", 20, {})
    card = {
        "format": "1",
        "task": "image-classification",
        "labels": ["dark", "light"],
        "max_length": 0,
        "opset": 20,
    }
    card |= {"fedtune": "0", "base": "", "base_sha256": ""}
    (folder / "model.json").write_text(json.dumps(card))
    return folder


class _Pixels(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.inner(pixels)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, shade in (("a.png", 20), ("b.jpg", 230)):
        Image.new("RGB", (40, 50), (shade, shade, shade)).save(folder / name)
    return folder


def read_json(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], run: Path, *args: object, **options: object) -> str:
    """The one line on stderr of a command that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        predict.command(run, *args, **options)
    found = capsys.readouterr()
    assert (e.value.code, found.out) == (2, "") and found.err.count("\n") == 1
    return found.err


def test_export_puts_its_figures_into_the_summary(run: Path) -> None:
    exports = json.loads((run / "summary.json").read_text())["export"]
    assert exports.keys() == {"adapter", "peft", "float32", "int8"}
    assert all((run / e["file"]).exists() for e in exports.values())


def test_export_without_onnx_says_what_it_wrote_and_refuses_other_keys(
    tmp_path: Path, tiny_job: Callable[..., Job], run_rounds: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    run_rounds(tiny_job("federation.rounds=1"), tmp_path / "run")
    capsys.readouterr()
    export.command(tmp_path / "run", ["export.peft=true"], json_=True)
    found = capsys.readouterr()
    assert json.loads(found.out).keys() == {"adapter", "peft"} and "has no summary.json yet" in found.err
    export.command(tmp_path / "run")
    assert "PEFT" not in capsys.readouterr().out and not (tmp_path / "run" / "peft").exists()
    with pytest.raises(SystemExit):
        export.command(tmp_path / "run", ["federation.rounds=9"])
    assert "only keys of [export] can change" in capsys.readouterr().err


def test_texts_get_a_label_and_a_probability_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict.command(run, TEXTS)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[2] for line in lines] == TEXTS and all(
        line.split()[0] in ("good", "bad") for line in lines
    )
    for place in (run, run / "onnx"):
        predict.command(place, TEXTS, json_=True)
        found = read_json(capsys)
        assert [f"{x['label']}  {x['probability']:.3f}  {x['input']}" for x in found] == lines
    predict.command(run, TEXTS, int8=True, json_=True)
    assert all(0.5 <= x["probability"] <= 1 for x in read_json(capsys))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.txt", "\n".join(TEXTS) + "\n\n"),
        ("t.csv", "n,review\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(TEXTS))),
        ("t.tsv", "review\n" + "\n".join(TEXTS)),
        ("t.jsonl", "\n".join(json.dumps({"review": t}) for t in TEXTS)),
    ],
)
def test_files_of_texts_and_a_table_of_answers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    predict.command(run, TEXTS, json_=True)
    expected = read_json(capsys)
    predict.command(run, None, [tmp_path / name], column="review", out_=tmp_path / "out.csv")
    assert capsys.readouterr().out.startswith("3 predictions: ")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["input"], r["label"]) for r in rows] == [(x["input"], x["label"]) for x in expected]
    np.testing.assert_allclose(
        [float(r["probability"]) for r in rows], [x["probability"] for x in expected], atol=1e-4
    )


def test_images_come_as_files_and_folders(
    image_folder: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict.command(image_folder, [str(images / "b.jpg")], [images], json_=True)
    assert [(Path(x["input"]).name, x["label"]) for x in read_json(capsys)] == [
        ("b.jpg", "light"),
        ("a.png", "dark"),
        ("b.jpg", "light"),
    ]


def test_a_device_without_torch_gets_the_same_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict.command(run, TEXTS, json_=True)
    expected = read_json(capsys)
    absent = ("torch", "transformers", "flwr", "onnx", "onnxscript", "sklearn", "peft")
    code = (
        f"import sys, typer; sys.modules.update(dict.fromkeys({absent!r})); from fedtune.cli import predict; "
        "typer.run(predict.command)"
    )
    arguments = [str(run / "onnx"), *TEXTS, "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [x["label"] for x in found] == [x["label"] for x in expected]
    np.testing.assert_allclose(
        [x["probability"] for x in found], [x["probability"] for x in expected], atol=1e-5
    )


def test_what_is_not_there_is_said_on_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n\n")
    assert "nowhere: does not exist; give a run folder" in refused(capsys, tmp_path / "nowhere", TEXTS)
    assert "no model.json in it" in refused(capsys, tmp_path / "empty", TEXTS)
    assert "nothing to predict; give at least one text" in refused(capsys, run)
    assert "input 2 is empty" in refused(capsys, run, ["good", "  "])
    assert "gone.txt: no such file" in refused(capsys, run, None, [tmp_path / "gone.txt"])
    assert "holds no text" in refused(capsys, run, None, [tmp_path / "blank.txt"])


def test_an_input_of_the_wrong_kind_is_said_on_one_line(
    run: Path, image_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("text\ngood\n")
    assert "this model labels texts; give .txt, .csv" in refused(capsys, run, None, [images / "a.png"])
    assert "this model labels texts" in refused(capsys, run, None, [images])
    assert f"is a file; to label what it holds, give --file {table}" in refused(capsys, run, [str(table)])
    assert "no column 'txt' (--column); did you mean 'text'?" in refused(
        capsys, run, None, [table], column="txt"
    )
    assert "lovely film: no such file; this model labels images" in refused(
        capsys, image_folder, ["lovely film"]
    )
    assert "this model labels images (.png" in refused(capsys, image_folder, None, [table])
    (images / "a.png").write_bytes(b"no image")
    assert "a.png: not a readable image" in refused(capsys, image_folder, None, [images])
    assert "has no model.int8.onnx; leave --int8 away" in refused(capsys, image_folder, ["x"], int8=True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.json", "{}", "model.json: cannot be read"),
        ("model.json", None, "no model.json in it"),
        ("model.onnx", "no graph", "onnxruntime cannot open it"),
        ("tokenizer.json", "no tokenizer", "not a readable tokenizer"),
    ],
)
def test_a_damaged_folder_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, said: str
) -> None:
    for path in (run / "onnx").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    assert said in refused(capsys, tmp_path, TEXTS)


def test_labels_that_do_not_fit_the_graph_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "onnx").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    card = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(card | {"labels": ["good"]}))
    assert "names 1 labels, the graph has 2; export the run again" in refused(capsys, tmp_path, TEXTS)
