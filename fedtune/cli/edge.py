"""fedtune edge: a device without torch."""

from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli import client
from fedtune.cli.common import JsonOption, no_dash, out, shell
from fedtune.cli.predict import FILE_HELP, AdapterOption, Int8Option, StaticOption, graph_of
from fedtune.errors import EnvironmentProblem, RunError, UserError
from fedtune.report.format import size

TRAIN = (
    "Examples:  fedtune edge train --server coordinator.example:9092 --dir keys/devices/device-001 "
    "--graphs edge-folder --data reviews.csv   |   "
    "fedtune edge train --server 127.0.0.1:9092 --insecure --name board --dir board --graphs edge-folder "
    "--data reviews.csv --memory-mb 250"
)
PREDICT = (
    'Examples:  fedtune edge predict edge-folder --adapter runs/fed-sb-001/adapter "what a fine day"   |   '
    "fedtune edge predict onnx --file reviews.csv --out labels.csv   |   "
    "cat lines.txt | fedtune edge predict onnx -"
)
BENCH = (
    "Examples:  fedtune edge bench --graphs edge-folder   |   "
    "fedtune edge bench --graphs edge-folder --batch-size 8 --threads 2 --json"
)

app = typer.Typer(
    name="edge",
    help="A device with onnxruntime and no torch: train, label, measure.",
    no_args_is_help=True,
    suggest_commands=False,
    pretty_exceptions_enable=False,
)
GraphsOption = Annotated[
    Path, typer.Option("--graphs", help="Folder that `fedtune prepare --edge` made.", show_default=False)
]
MemoryOption = Annotated[
    int,
    typer.Option(
        "--memory-mb",
        min=0,
        help="What the process that trains may have in memory, in MB, mapped files among them (0: no limit).",
    ),
]


@app.command(epilog=TRAIN)
@shell
def train(
    server: client.ServerOption,
    folder: client.FolderOption,
    graphs: GraphsOption,
    data: client.DataOption,
    policy: client.PolicyOption = None,
    name: client.NameOption = "",
    insecure: client.InsecureOption = False,
    threads: client.ThreadsOption = 0,
    idle: client.IdleOption = 600.0,
    memory_mb: MemoryOption = 0,
    kind: client.ClassOption = "",
    log_json: client.LogOption = False,
) -> None:
    """Joins a federation and trains when asked, as `fedtune client` does, with onnxruntime alone.
    Coordinators see no difference.
    """
    from fedtune.onnx.folder import CARD

    if not (graphs / CARD).is_file():
        raise RunError(
            f"--graphs {graphs}: no {CARD} in it; give the folder that `fedtune prepare JOB -o "
            f"BUNDLE --edge {graphs}` makes"
        )
    client.join(
        server,
        folder,
        data,
        policy,
        name,
        insecure,
        log_json,
        threads=threads,
        idle_seconds=idle,
        graphs=graphs,
        memory_mb=memory_mb,
        kind=kind,
    )


@app.command(epilog=PREDICT)
@shell
def predict(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Folder of `fedtune prepare --edge`, with --adapter; or a run's onnx folder.",
            show_default=False,
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...",
            help="Texts, or image files; - reads them from standard input, one a line.",
            show_default=False,
        ),
    ] = None,
    adapter: AdapterOption = None,
    files: Annotated[list[Path] | None, typer.Option("--file", help=FILE_HELP, show_default=False)] = None,
    int8: Int8Option = False,
    static: StaticOption = False,
    column: Annotated[
        str, typer.Option("--column", help="Column with the text, in .csv, .tsv, .jsonl and .parquet.")
    ] = "text",
    out_: Annotated[
        Path | None,
        typer.Option(
            "--out", callback=no_dash, help="Write input, label and probability as .csv.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Inputs run at once.")] = 16,
    threads: client.ThreadsOption = 0,
    json_: JsonOption = False,
) -> None:
    """Prints the label of each text or image and its probability."""
    from fedtune.cli.predict import show

    _require_runtime()
    from fedtune.onnx.folder import CARD
    from fedtune.onnx.predict import Predictor

    if (place / CARD).is_file():
        if adapter is None:
            raise UserError(
                f"{place}: holds graphs for training, which need trained values; give --adapter RUN/adapter"
            )
        if int8 or static:
            raise UserError(
                f"--{'int8' if int8 else 'static'}: training graphs have no int8 form; "
                "leave it away, or give a run's onnx folder"
            )
        predictor = Predictor.adapted(place, adapter, threads)
    else:
        predictor = Predictor.open(place, graph_of(int8, static, adapter), threads, adapter)
    show(predictor, inputs or [], files or [], column, out_, batch_size, json_)


@app.command(epilog=BENCH)
@shell
def bench(
    graphs: GraphsOption,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=65536, help="Examples in a step.")
    ] = 16,
    length: Annotated[
        int, typer.Option("--length", min=0, help="Tokens of each text (0: as many as the job allows).")
    ] = 0,
    steps: Annotated[int, typer.Option("--steps", min=1, max=10_000, help="Steps timed.")] = 5,
    threads: client.ThreadsOption = 0,
    memory_mb: MemoryOption = 0,
    json_: JsonOption = False,
) -> None:
    """Measures a training step on made-up examples: its time, the memory of the process,
    and the folder's size on disk.
    """
    _require_runtime()
    from fedtune.edge.bench import bench as measure

    found = measure(graphs, batch_size, length, steps, threads, memory_mb)
    if json_:
        print(found.dump())
        return
    lines = {
        "step": (
            f"{found.step_seconds:.3f} s (median of {found.steps}; least {found.step_seconds_least:.3f} s), "
            f"{found.examples} examples of length {found.length}, {found.at_once} at a time"
        ),
        "units": ", ".join(f"{unit} {seconds:.3f} s" for unit, seconds in found.units_seconds.items()),
        "open": f"{found.open_seconds:.2f} s",
        "memory": f"{size(found.peak_bytes)} at most, {size(found.start_bytes)} before the graph was opened",
        "disk": size(found.disk_bytes),
    }
    for name, text in lines.items():
        if text:
            out.print(f"{name:7} {text}", markup=False, highlight=False, soft_wrap=True)


def _require_runtime() -> None:
    try:
        import fedtune.onnx.predict  # noqa: F401
    except ModuleNotFoundError as e:
        raise EnvironmentProblem(f"fedtune edge needs the package {e.name}; install fedtune[edge]") from None
