"""The privacy of a run: its shape in a summary, and what it says in words and rows.

The page and the terminal both show these.
"""

import math
from collections.abc import Sequence
from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from fedtune.report.format import ABSENT, bound, clean, count, plural

Epsilon = float | Literal["inf"]


class Share(TypedDict):
    """So many clients have lost this much."""

    epsilon: Epsilon
    clients: int


class SpentBy(TypedDict):
    """What the client that lost most in the end had lost after this round."""

    round: int
    epsilon: Epsilon


class Privacy(TypedDict):
    """What the ledger says was spent.

    Runs without privacy, and those of older versions, have the first three alone.

    `epsilon` at `delta` is that of the unit that lost most, of the `client` ("": of all alike), and the
    smallest of `readings`, by the accountant named. `target` is what the job allows (0: it names none) and
    `left` what of it is unspent. `spread` goes from the most to the least; `parts` is what each kind of
    release would have cost alone.
    """

    unit: str
    epsilon: str | float
    note: str
    delta: NotRequired[float]
    noise_multiplier: NotRequired[float]
    clip: NotRequired[float]
    accountant: NotRequired[str]
    readings: NotRequired[dict[str, Epsilon]]
    target: NotRequired[float]
    left: NotRequired[float]
    client: NotRequired[str]
    spread: NotRequired[list[Share]]
    rounds: NotRequired[list[SpentBy]]
    parts: NotRequired[dict[str, Epsilon]]
    assumptions: NotRequired[list[str]]


ACCOUNTANTS = {
    "pld": ("PLD", "dp-accounting, privacy loss distributions"),
    "rdp": ("RDP", "dp-accounting, Rényi divergences"),
    "prv": ("PRV", "Opacus, privacy random variables"),
}
PARTS = {
    "update": "what was trained",
    "clip-bits": "number of updates within the clip, for the clip that adapts",
    "metrics": "training loss and accuracy",
    "init": "the gradient that the frame was made from",
}
"""Kinds of releases; one that stands not here keeps its name."""
UNSCORED = (
    "No accuracy: devices score nothing in this job, as the scores of a single one have no noise. "
    "To measure the model, have labelled examples of your own where the job's data.source says, and run "
    "`fedtune export RUN`, which says how many it gets right; `fedtune predict RUN` then labels others."
)
"""Of a live run that hides its clients."""
GLOSSARY = {
    "delta": "the chance with which epsilon may not hold",
    "noise multiplier": "standard deviation of the noise over the clip, the most that one unit can add",
    "accountant": (
        "a way to bound epsilon from the noise and the rounds; "
        "several are valid at once, and the smallest counts"
    ),
}


def value(epsilon: str | float) -> float:
    """The number that a summary means; what is not a number is infinite."""
    try:
        found = float(epsilon)
    except ValueError:
        return math.inf
    return math.inf if math.isnan(found) else found


def shown(epsilon: str | float) -> str:
    return bound(value(epsilon))


def delta(p: Privacy) -> str:
    return f"{p['delta']:.3g}" if "delta" in p else ABSENT


def lost(p: Privacy) -> bool:
    """Whether nothing is protected."""
    return math.isinf(value(p["epsilon"]))


def sentence(p: Privacy) -> str:
    """The privacy line, as plain as it is."""
    return f"{claim(p)} {clean(p['note'])}".strip()


def claim(p: Privacy) -> str:
    if p["unit"] == "none":
        return "No differential privacy: epsilon is infinite."
    if lost(p):
        return "Epsilon is infinite: nobody is protected."
    at = f" at delta = {delta(p)}" if "delta" in p else ""
    return f"Epsilon is {shown(p['epsilon'])}{at}, protecting each {clean(p['unit'])}{_budget(p)}."


def _budget(p: Privacy) -> str:
    if not p.get("target"):
        return ""
    return (
        f"; {_down(p['left'])} is left of the {p['target']:g} allowed"
        if p.get("left")
        else f"; of the {p['target']:g} allowed nothing is left"
    )


def _down(left: float) -> str:
    """What is left, never more than there is."""
    return f"{math.floor(left * 1e4) / 1e4:g}"


def short(p: Privacy) -> str:
    """What stands beside the figure in a tile or a row."""
    if p["unit"] == "none":
        return "no differential privacy"
    if lost(p):
        return "nobody is protected"
    return f"of each {clean(p['unit'])}" + (f", delta {delta(p)}" if "delta" in p else "")


ACCOUNTANT_HEADER = ("accountant", "epsilon", "what it is")


def accountant_rows(p: Privacy) -> list[tuple[str, str, str]]:
    """(name, epsilon, what it is) of each accountant; one that could not read the run has no figure."""
    found = p.get("readings", {})
    if not found.keys() & ACCOUNTANTS.keys():
        return []
    rows = []
    for key, (name, words) in ACCOUNTANTS.items():
        note = (
            f"{words}; quoted, the smallest"
            if key == p.get("accountant")
            else words
            if key in found
            else f"{words}; not installed here, or not for this sampling"
        )
        rows.append((name, shown(found[key]) if key in found else ABSENT, note))
    return rows


PART_HEADER = ("what left", "epsilon, had it left alone")


def part_rows(p: Privacy) -> list[tuple[str, str]]:
    return [(PARTS.get(name, clean(name)), shown(epsilon)) for name, epsilon in p.get("parts", {}).items()]


SPREAD_HEADER = ("epsilon", "clients")


def spread_rows(p: Privacy) -> list[tuple[str, str]]:
    return [] if lost(p) else [(shown(row["epsilon"]), count(row["clients"])) for row in p.get("spread", [])]


def spread(p: Privacy) -> str:
    """How evenly the clients lost, in one sentence."""
    rows = p.get("spread", [])
    clients = sum(row["clients"] for row in rows)
    if not clients or lost(p):
        return ""
    if len(rows) == 1:
        return f"All {plural(clients, 'client')} have lost the same: {shown(rows[0]['epsilon'])}."
    most, least = rows[0], rows[-1]
    return (
        f"Over {plural(clients, 'client')}, epsilon goes from {shown(least['epsilon'])} "
        f"({count(least['clients'])}) to {shown(most['epsilon'])} ({count(most['clients'])})."
    )


ROUND_HEADER = ("round", "epsilon")


def round_rows(p: Privacy) -> list[tuple[str, str]]:
    return [] if lost(p) else [(str(row["round"]), shown(row["epsilon"])) for row in p.get("rounds", [])]


def assumed(p: Privacy) -> str:
    """What stands above the assumptions."""
    return "What the job meant to give" if lost(p) else "What has to be true for it"


def tiles(p: Privacy) -> Sequence[tuple[str, str, str]]:
    """(name, figure, note) of what stands large on the page of its own."""
    found = [("epsilon", shown(p["epsilon"]), short(p))]
    if "delta" in p:
        found.append(("delta", delta(p), "chance that epsilon does not hold"))
    if "noise_multiplier" in p and "clip" in p:
        found.append(("noise multiplier", f"{p['noise_multiplier']:g}", f"times the clip of {p['clip']:g}"))
    if p.get("target") and not lost(p):
        found.append(("left", _down(p.get("left", 0.0)), f"of the {p['target']:g} that the job allows"))
    return found
