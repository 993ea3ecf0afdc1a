"""How many client updates a second each simulation engine does: fedtune's engines,
Flower's, and pfl-research's.

    python benchmarks/simulation.py [--cases a,b,c,d] [--blocks N] [--seconds S] [--quick] [--json] [--threads
                                    N] [--peers flower,pfl] [--pfl FOLDER]

All contenders of a case do the same work: the same clients with the same tokenised examples, the same cohort
in each round, the same start, number and size of steps, and optimizer (`contenders/work.py`). Each is a
process that is started once and waits while the others run; blocks of whole rounds alternate. Start and first
round are left out, and nothing is evaluated.

After two rounds everybody's loss, and distance from the start, must be near fedtune's:
who does not train is not compared.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from fedtune.packages import cache_dir

ENGINES = ("serial", "vectorised")  # of fedtune; the last is the one that the targets are about
FASTEST = f"fedtune {ENGINES[-1]}"
OWN = tuple(f"fedtune {engine}" for engine in ENGINES)
PEERS = {"flower": ("flower",), "pfl": ("pfl", "pfl 2 processes")}
COHORTS = {"a": 20, "b": 20, "c": 200, "d": 200}
QUICK = {"a": 4, "b": 4, "c": 20, "d": 20}
TARGETS = {"flower": {"a": 5.0, "b": 10.0, "c": 50.0, "d": 200.0}, "pfl": {"a": 1.4, "b": 2.5, "c": 5.0}}
PRODUCTS = 0.7  # of a step of case (a) at least
ABOUT = {
    "a": "MiniLM, rank-16 cores on all linears, 4 steps of 8 texts",
    "b": "the same, cores of the top two blocks",
    "c": "MLP on digits, all parameters, 4 steps of 8 images",
    "d": "tensors of (a), clients that do nothing",
}
PFL = (
    "pfl==0.6.0",
    "multiprocess==0.70.18",
    "dill==0.4.1",
    "prv-accountant==0.2.0",
    "dp-accounting==0.5.0",
    "absl-py==2.5.1",
    "attrs==23.2.0",
)
LOSS, MOVED = 0.1, 0.2  # relative distance from fedtune's after two rounds, at most
ROUNDING = 1e-4  # where nobody moves, float32 averages still do


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="a,b,c,d", help="which, separated by commas")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each contender")
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help="length of a block, about: it is of whole rounds, at least one",
    )
    parser.add_argument("--quick", action="store_true", help="one block of one round: shows that it runs")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument(
        "--pfl",
        type=Path,
        default=cache_dir() / f"benchmark-{PFL[0].replace('==', '-')}",
        help="folder with pfl's packages; made if missing",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="torch threads of the contenders that work in one process; 1 where cores are shared",
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="which, separated by commas")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(*options.serve)
    cases, options.peers = options.cases.split(","), options.peers.split(",")
    for key, given, known in (("cases", cases, ABOUT), ("peers", options.peers, PEERS)):
        if unknown := set(given) - known.keys():
            parser.error(f"--{key}: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if "pfl" in options.peers:
        provide_pfl(options.pfl)
    found, targets = {}, []
    for name in cases:
        found[name] = measure(name, options)
        targets += (own := judge(name, found[name]))
        show(name, found[name], own)
    if options.json:
        print(json.dumps({"targets": targets, "cases": found}))


def serve(contender: str, text: str) -> None:
    """In a contender's process."""
    from contenders.work import Order

    order = Order(*json.loads(text))
    if contender == "flower":
        from contenders import flower_engine

        flower_engine.run(order)
    elif contender == "pfl":
        from contenders import pfl_engine
        from contenders.serve import Commands

        pfl_engine.run(order, Commands())
    elif contender == "pfl 2 processes":
        from contenders import pfl_pair

        pfl_pair.run(order)
    else:
        from contenders import fedtune_engine

        fedtune_engine.run(order, contender.removeprefix("fedtune "))


def provide_pfl(folder: Path) -> None:
    """pfl and what it imports beyond fedtune's own requirements, in a folder apart:
    no version of the environment changes.
    """
    if (folder / "pfl").is_dir():
        return
    print(f"fetching {', '.join(PFL)} to {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        target = Path(scratch) / "packages"
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *PFL],
            check=True,
            stdout=sys.stderr,
        )
        target.rename(folder)


class Contender:
    """A process that runs rounds when told to. `cpu` is what it used while it was not."""

    def __init__(self, name: str, case: str, cohort: int, folder: Path, options: argparse.Namespace) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        environment = os.environ | {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        if name in ("flower", "pfl 2 processes"):  # two workers
            environment |= {"OMP_NUM_THREADS": "1"}
        if name.startswith("pfl"):
            environment |= {
                "PYTHONPATH": os.pathsep.join(
                    [*filter(None, [os.environ.get("PYTHONPATH")]), str(options.pfl)]
                )
            }
        order = json.dumps([case, cohort, options.threads, str(folder / f"run-{name}")])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve", name, order],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,
            )
        self.updates: list[float] = []
        self.idle_cpu = self.idle_seconds = 0.0

    def ask(self, **command: object) -> dict:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        return self.read()

    def read(self) -> dict:
        """The next answer; the first says that it is ready."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended:\n{self.log.read_text(errors='replace')[-3000:]}")
        return json.loads(line)

    def cpu(self) -> float:
        """Seconds of processor time that it and its children have used."""
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def end(self) -> None:
        tree = self._tree()
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _tree(self) -> list[psutil.Process]:
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def measure(case: str, options: argparse.Namespace) -> dict:
    """Client updates a second of each block of each contender, and what showed that all did the same."""
    cohort = (QUICK if options.quick else COHORTS)[case]
    blocks, seconds = (1, 0.0) if options.quick else (options.blocks, options.seconds)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="simulation-")))
        contenders = [
            stack.enter_context(started(name, case, cohort, folder, options))
            for name in (*OWN, *(n for p in options.peers for n in PEERS[p]))
        ]
        for contender in contenders:
            contender.read()
        rounds, trained = {}, {}
        for contender in contenders:
            contender.ask(rounds=1)
            second = contender.ask(rounds=1)
            rounds[contender.name] = max(1, round(seconds / second["seconds"]))
            trained[contender.name] = {"loss": second["loss"], "moved": second["moved"]}
        require_alike(case, trained, 3 if options.quick else 1)
        for block in range(blocks):
            for contender in contenders[block % len(contenders) :] + contenders[: block % len(contenders)]:
                one_block(contender, contenders, rounds[contender.name], cohort)
        share = contenders[len(ENGINES) - 1].ask(products=True)["share"] if case == "a" else None
        return {
            "cohort": cohort,
            "rounds": rounds,
            "trained": trained,
            "products": share,
            "updates": {c.name: c.updates for c in contenders},
            "idle_cpu": {c.name: c.idle_cpu / c.idle_seconds for c in contenders},
        }


@contextlib.contextmanager
def started(
    name: str, case: str, cohort: int, folder: Path, options: argparse.Namespace
) -> Iterator[Contender]:
    contender = Contender(name, case, cohort, folder, options)
    try:
        yield contender
    finally:
        contender.end()


def one_block(contender: Contender, contenders: list[Contender], rounds: int, cohort: int) -> None:
    """Runs one block, and notes what the others use of the processor meanwhile."""
    others = [c for c in contenders if c is not contender]
    before, began = [c.cpu() for c in others], time.monotonic()
    contender.updates.append(rounds * cohort / contender.ask(rounds=rounds)["seconds"])
    passed = time.monotonic() - began
    for other, cpu in zip(others, before):
        other.idle_cpu += other.cpu() - cpu
        other.idle_seconds += passed


def require_alike(case: str, trained: dict[str, dict[str, float]], slack: float) -> None:
    """Ends the benchmark when a peer has not learnt what fedtune has.

    Few clients see few texts: they need slack.
    """
    own = trained[FASTEST]
    for name, found in trained.items():
        for key, limit in (("loss", LOSS), ("moved", MOVED)):
            if abs(found[key] - own[key]) > slack * limit * own[key] + ROUNDING:
                sys.exit(
                    f"case {case}: {name} has {key} {found[key]:.4f} after two rounds, "
                    f"{FASTEST} {own[key]:.4f}: not the same work"
                )


def judge(case: str, found: dict) -> list[dict]:
    """The targets of one case."""
    own = statistics.median(found["updates"][FASTEST])
    targets = []
    for peer, names in PEERS.items():
        medians = [statistics.median(found["updates"][name]) for name in names if name in found["updates"]]
        if not medians or case not in TARGETS[peer]:
            continue
        ratio, least = own / max(medians), TARGETS[peer][case]
        targets.append(target(f"({case}) updates a second, {FASTEST} over {peer}", ratio, least))
    if found["products"] is not None:
        targets.append(
            target(
                f"({case}) bare matrix products, share of a step of {FASTEST}", found["products"], PRODUCTS
            )
        )
    return targets


def target(name: str, value: float, least: float) -> dict:
    return {"name": name, "value": value, "target": f">= {least:g}", "met": value >= least}


def show(case: str, one: dict, targets: list[dict]) -> None:
    """loss: of training in the second round; moved: L2 distance of the model after it from the start; idle
    CPU: of one core, while others ran.
    """
    console = Console(width=max(120, shutil.get_terminal_size().columns))
    table = Table(
        "",
        "rounds a block",
        "updates/s",
        "all blocks",
        f"{FASTEST} : this",
        "loss",
        "moved",
        "idle CPU",
        title=f"({case}) {ABOUT[case]}; {one['cohort']} clients a round",
    )
    own = statistics.median(one["updates"][FASTEST])
    for name, updates in one["updates"].items():
        median, trained = statistics.median(updates), one["trained"][name]
        table.add_row(
            name,
            f"{one['rounds'][name]}",
            number(median),
            " ".join(map(number, updates)),
            f"{own / median:.2f}",
            f"{trained['loss']:.4f}",
            f"{trained['moved']:.4f}",
            f"{one['idle_cpu'][name]:.1%}",
        )
    console.print(table)
    for found in targets:
        print(
            f"{found['name']}: {found['value']:.2f}, target {found['target']}: "
            f"{'met' if found['met'] else 'not met'}",
            flush=True,
        )


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    main()
