"""fedtune predict: labels for texts or images, with onnxruntime alone."""

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.common import JsonOption, no_dash, out, shell
from fedtune.common.storage import write_atomic
from fedtune.errors import EnvironmentProblem, UserError

if TYPE_CHECKING:
    from fedtune.onnx.predict import Predictor

EXAMPLES = (
    'Examples:  fedtune predict runs/fed-sb-001 "what a fine day"   |   '
    "fedtune predict runs/fed-sb-001 --file reviews.csv --column text --out labels.csv   |   "
    "fedtune predict runs/head-001 --file photos/"
)
FILE_HELP = (
    "Texts in .txt (one a line), .csv, .tsv, .jsonl or .parquet; an image or a folder of images. Repeatable."
)
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
Int8Option = Annotated[bool, typer.Option("--int8", help="Use the int8 graph.")]
StaticOption = Annotated[bool, typer.Option("--static", help="Use the int8 graph with fixed ranges.")]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        help="Use this adapter.safetensors, or the one in this folder, in place of the run's own.",
        show_default=False,
    ),
]


def graph_of(int8: bool, static: bool, adapter: Path | None) -> str:
    """The graph in an onnx folder that the options ask for. Raises UserError for more than one."""
    from fedtune.onnx.predict import ADAPTERS, FLOAT32, INT8, STATIC

    asked = [name for name, yes in ((INT8, int8), (STATIC, static), (ADAPTERS, adapter is not None)) if yes]
    if len(asked) > 1:
        raise UserError("--int8, --static, --adapter: each asks for another graph; give one of them")
    return asked[0] if asked else FLOAT32


@shell
def command(
    run: Annotated[Path, typer.Argument(help="Run folder, or a copy of its onnx folder.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...",
            help="Texts; image files for a model of images. - reads them from standard input, one a line.",
            show_default=False,
        ),
    ] = None,
    files: Annotated[list[Path] | None, typer.Option("--file", help=FILE_HELP, show_default=False)] = None,
    int8: Int8Option = False,
    static: StaticOption = False,
    adapter: AdapterOption = None,
    column: Annotated[
        str, typer.Option("--column", help="Column with the text, in .csv, .tsv, .jsonl and .parquet.")
    ] = "text",
    out_: Annotated[
        Path | None,
        typer.Option(
            "--out", callback=no_dash, help="Write input, label and probability as .csv.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Inputs run at once.")] = 64,
    json_: JsonOption = False,
) -> None:
    """Prints the label of each text or image and its probability. Needs onnxruntime and no torch."""
    try:
        from fedtune.onnx.predict import Predictor
    except ModuleNotFoundError as e:
        raise EnvironmentProblem(
            f"fedtune predict needs the package {e.name}; install fedtune[edge]"
        ) from None
    predictor = Predictor.open(run, graph_of(int8, static, adapter), adapter=adapter)
    show(predictor, inputs or [], files or [], column, out_, batch_size, json_)


def show(
    predictor: "Predictor",
    inputs: list[str],
    files: list[Path],
    column: str,
    out_: Path | None,
    batch_size: int,
    json_: bool,
) -> None:
    """Labels everything that was given, and prints or writes what it found."""
    given = gather(predictor, inputs, files, column)
    labels, probabilities = predictor.predict(given, batch_size)
    rows = [(x, label, float(p)) for x, label, p in zip(given, labels, probabilities)]
    if out_:
        write_atomic(out_, _as_csv(rows).encode())
    if json_:
        print(
            json.dumps(
                [{"input": x, "label": label, "probability": round(p, 6)} for x, label, p in rows],
                indent=2,
                ensure_ascii=False,
            )
        )
    elif out_:
        out.print(f"{len(rows):,} predictions: {out_}", markup=False, highlight=False, soft_wrap=True)
    else:
        for x, label, p in rows:
            out.print(
                f"{label}  {p:.3f}  {' '.join(x.split())}", markup=False, highlight=False, soft_wrap=True
            )


def gather(predictor: "Predictor", inputs: list[str], files: list[Path], column: str) -> list[str]:
    """Everything to label: what was typed, "-" standing for the lines of standard input,
    then what the files hold.

    Raises UserError for a file that this model cannot read.
    """
    from fedtune.data.images import SUFFIXES

    inputs = [line for text in inputs for line in (_lines() if text == "-" else [text])]
    if not predictor.task.inputs.in_folder:
        for text in inputs:  # a file's name is a text too, but nobody means it
            if Path(text).suffix.lower() in (*TABLES, ".txt", *SUFFIXES) and os.path.isfile(text):
                raise UserError(f"{text}: is a file; to label what it holds, give --file {text}")
        return [*inputs, *(text for path in files for text in _texts(path, column, SUFFIXES))]
    given: list[str | Path] = [*inputs, *files]
    found = [str(image) for path in given for image in _images(path, SUFFIXES)]
    for image in found:
        if not os.path.isfile(image):
            raise UserError(
                f"{image}: no such file; this model labels images, give image files or "
                "a folder of them with --file"
            )
    return found


def _lines() -> list[str]:
    found = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not found:
        raise UserError("standard input holds no line; pipe texts in, one a line")
    return found


def _texts(path: Path, column: str, images: tuple[str, ...]) -> list[str]:
    from fedtune.data import tables

    suffix = path.suffix.lower()
    if suffix in images or path.is_dir():
        raise UserError(f"{path}: this model labels texts; give .txt, {', '.join(TABLES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; check --file")
    if suffix in TABLES:
        return tables.column(tables.read_table(path, [column]), column, "--column")
    if suffix != ".txt":
        raise UserError(f"{path}: suffix {suffix!r} is not known; give .txt, {', '.join(TABLES)}")
    lines = [line for line in tables.read_utf8(path).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: holds no text; give a file with at least one line")
    return lines


def _images(path: str | Path, suffixes: tuple[str, ...]) -> Sequence[str | Path]:
    if not os.path.isdir(path):  # of os.path: typed text can be longer than a path may be
        if Path(path).suffix.lower() not in suffixes and os.path.isfile(path):
            raise UserError(
                f"{path}: this model labels images ({', '.join(suffixes)}); give one or a folder of them"
            )
        return [path]
    found = sorted(
        p for p in Path(path).rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith(".")
    )
    if not found:
        raise UserError(f"{path}: holds no image ({', '.join(suffixes)}); give a folder with at least one")
    return found


def _as_csv(rows: list[tuple[str, str, float]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["input", "label", "probability"])
    writer.writerows((x, label, f"{p:.6f}") for x, label, p in rows)
    return text.getvalue()
