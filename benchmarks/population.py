"""What a population costs: the same rows dealt to few and to many clients, the same cohort;
seconds until training, and memory.

    OMP_NUM_THREADS=1 python benchmarks/population.py [--quick] [--json]

A CSV of 300,000 short rows goes to 1,000 and to 100,000 clients, in each of three ways: by a column of
users, iid, and by Dirichlet draws of labels. Each case is a process of its own that runs two rounds of 100
clients on a tiny BERT with random weights, evaluates a sample between and all held-out examples at the
end, and writes summary and page. It is forked from one that has the imports done: seconds are without
them, peak memory is with them.
"""

import argparse
import csv
import json
import multiprocessing
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

GROWTH_MB, START_S, FILES_MB = 64.0, 30.0, 2.0
"""Most that peak memory may grow from few to many clients, that a start may take, and that run.json,
summary and page may take together.
"""
WORDS = {"good": ("bright", "lovely", "warm", "fine"), "bad": ("dull", "awful", "cold", "poor")}
IMPORTS = [
    "fedtune.workflows.simulate",
    "fedtune.workflows.finish",
    "fedtune.report.page",
    "transformers.models.bert.modeling_bert",
]
FILLERS = ("the", "a", "film", "book", "meal", "room", "was", "is", "very", "quite")
WAYS = {
    "natural": ("data.partition=natural", "data.clients=0"),
    "iid": ("data.partition=iid",),
    "dirichlet": ("data.partition=dirichlet", "data.alpha=0.5"),
}


@dataclass(frozen=True)
class Size:
    rows: int = 300_000
    clients: tuple[int, int] = (1_000, 100_000)
    cohort: int = 100
    ways: tuple[str, ...] = tuple(WAYS)
    page: bool = True


QUICK = Size(rows=6_000, clients=(100, 2_000), cohort=10, ways=("natural",), page=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few thousand rows: shows that it runs, measures nothing"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    size = QUICK if options.quick else Size()
    found = measure(size)
    reached = targets(size, found)
    show(found, reached)
    if options.json:
        print(json.dumps({"targets": reached, "cases": found}))


def measure(size: Size) -> list[dict[str, Any]]:
    """One dictionary a case, each from a process of its own."""
    context, found = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(IMPORTS)
    with tempfile.TemporaryDirectory() as name, context.Pool(1, maxtasksperchild=1) as fresh:
        folder = Path(name)
        write_rows(folder / "rows.csv", size)
        fresh.apply(make_base, [folder / "base"])
        for way in size.ways:
            for clients in size.clients:
                keys = [
                    *WAYS[way],
                    *([f"data.by=user{clients}"] if way == "natural" else [f"data.clients={clients}"]),
                ]
                keys += [
                    f"federation.cohort={size.cohort}",
                    f"evaluation.max-examples={size.rows // 300}",
                    f"report.html={str(size.page).lower()}",
                ]
                found.append({"way": way, "clients": clients} | fresh.apply(case, [folder, keys]))
    return found


def write_rows(path: Path, size: Size) -> None:
    """Texts of three to eight words with a label that one of them tells,
    and a column of users for each number of clients.
    """
    draw = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["text", "label", *(f"user{clients}" for clients in size.clients)])
        for row in range(size.rows):
            label = draw.choice(("bad", "good"))
            words = [*draw.choices(FILLERS, k=draw.randint(2, 7)), draw.choice(WORDS[label])]
            out.writerow([" ".join(words), label, *(f"u{row % clients}" for clients in size.clients)])


def case(folder: Path, keys: list[str]) -> dict[str, Any]:
    """In a process of its own: the whole run.

    Seconds since its start, MB, and how many clients answered in the last round.
    """
    import torch

    from fedtune.job import parse_job
    from fedtune.round.watch import Watch
    from fedtune.runs.folder import create_run
    from fedtune.workflows.finish import finish
    from fedtune.workflows.setup import open_setup, run_facts
    from fedtune.workflows.simulate import Simulation

    torch.set_num_threads(1)
    job = parse_job(
        "",
        [
            f"model.source={folder / 'base'}",
            "model.max-length=16",
            f"data.source={folder / 'rows.csv'}",
            "adapter.rank=4",
            "federation.rounds=2",
            "federation.batch-size=8",
            "evaluation.baselines=[]",
            "evaluation.batch-size=256",
            "simulation.threads=1",
            "export.onnx=false",
            "export.int8=false",
            "export.peft=false",
            *keys,
        ],
    )
    began, marks = time.perf_counter(), {}
    setup = open_setup(job)
    marks["open_s"] = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as name:
        run = create_run(Path(name) / "run", job, run_facts(setup))

        def line(line: dict[str, Any]) -> None:
            marks.setdefault(f"round{line['round']}_s", time.perf_counter() - began)

        simulation = Simulation(setup, run, Watch(line=line))
        simulation.rounds()
        marks["peak_before_end_mb"] = peak()
        finish(simulation)
        files = (
            sum(
                path.stat().st_size
                for path in (run.path / "run.json", run.summary, run.page)
                if path.exists()
            )
            / 1e6
        )
        written = len(run.metrics()[-1]["clients"])
    marks["all_s"] = time.perf_counter() - began
    return {
        key: round(value, 2)
        for key, value in (marks | {"peak_mb": peak(), "files_mb": files, "answered": written}).items()
    }


def make_base(folder: Path) -> None:
    """A BERT of two blocks, width 32, random weights, with a tokenizer of the words there are."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS, *WORDS["good"], *WORDS["bad"]]
    tokenizer = Tokenizer(
        models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)


def peak() -> float:
    """Peak resident MB of this process alone; resource.getrusage would count that of the
    process that started it.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("/proc/self/status has no VmHWM; this benchmark runs on Linux")


def targets(size: Size, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with what was measured, over all ways to divide the rows."""
    few, many = ([c for c in found if c["clients"] == clients] for clients in size.clients)
    growth = max(b["peak_mb"] - a["peak_mb"] for a, b in zip(few, many))
    start, files = max(c["round0_s"] for c in many), max(c["files_mb"] for c in many)
    name = f"{size.clients[1]:,} clients"
    return [
        {
            "name": f"peak memory growth to {name}, MB",
            "value": round(growth, 1),
            "target": f"at most {GROWTH_MB:g}",
            "met": growth <= GROWTH_MB,
        },
        {
            "name": f"seconds until round 1 of {name}",
            "value": round(start, 1),
            "target": f"at most {START_S:g}",
            "met": start <= START_S,
        },
        {
            "name": f"run.json, summary and page of {name}, MB",
            "value": round(files, 2),
            "target": f"at most {FILES_MB:g}",
            "met": files <= FILES_MB,
        },
    ]


def show(found: list[dict[str, Any]], reached: list[dict[str, Any]]) -> None:
    """The table for people."""
    columns = {
        "open_s": "data open s",
        "round0_s": "round 1 begins s",
        "round2_s": "rounds done s",
        "all_s": "all s",
        "peak_mb": "peak MB",
        "files_mb": "files MB",
    }
    table = Table("divided", "clients", *columns.values())
    for c in found:
        table.add_row(
            c["way"],
            f"{c['clients']:,}",
            *(f"{c[key]:.2f}" if key == "files_mb" else f"{c[key]:.1f}" for key in columns),
        )
    Console(width=110).print(table)
    for target in reached:
        print(
            f"{target['name']}: {target['value']}, {target['target']}: {'met' if target['met'] else 'missed'}"
        )


if __name__ == "__main__":
    main()
