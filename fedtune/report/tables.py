"""Rows of figures as text: the page and the terminal both show these."""

from typing import Any, TypeVar

from fedtune.report import facts
from fedtune.report.facts import Fact
from fedtune.report.format import ABSENT, clean, count, duration, number, signed, size, small
from fedtune.report.summary import Summary, few

T = TypeVar("T")
EXPORT_HEADER = ("kind", "file", "size", "largest difference", "label agreement", "accuracy", "on")
EXPORTS = {
    "adapter": "native adapter",
    "float32": "ONNX, float32",
    "adapters": "ONNX, adapters as inputs",
    "int8": "ONNX, int8",
    "static": "ONNX, int8 with fixed ranges",
    "peft": "PEFT folder",
}


def exports(s: Summary) -> list[tuple[str, ...]]:
    """Rows of kind, file, size, largest difference, agreement of labels, accuracy."""
    rows: list[tuple[str, ...]] = []
    for kind, e in s.get("export", {}).items():
        bytes_ = e.get("bytes")
        rows.append(
            (
                EXPORTS.get(kind, clean(kind)),
                clean(e.get("file") or f"left out: {e.get('note', 'no reason given')}"),
                ABSENT if bytes_ is None else size(bytes_),
                small(e.get("max_difference")),
                number(e.get("label_agreement")),
                number(e.get("accuracy")),
                count(e["examples"]) if "examples" in e else ABSENT,
            )
        )
    return rows


ROUND_HEADER = (
    "round",
    "train loss",
    "held-out loss",
    "accuracy",
    "evaluated",
    "clients",
    "refused",
    "up",
    "down",
    "total",
    "time",
)


FLEET_HEADER = ("lost", "simulated")
"""What device classes add to a row: clients that dropped out or missed the deadline,
and the simulated time at its end.
"""


PERSONAL_HEADER = ("personal accuracy", "of clients")
"""What clients that keep something of their own add to a row."""


def round_header(s: Summary) -> tuple[str, ...]:
    return (
        *ROUND_HEADER,
        *(() if facts.clock(s) is None else FLEET_HEADER),
        *(PERSONAL_HEADER if s.get("personal") else ()),
    )


def round_rows(s: Summary, limit: int = 0) -> list[tuple[str, ...]]:
    """One row per round under `round_header`; with a limit, the first,
    the last and an even choice between.
    """
    return [
        (
            str(r["round"]),
            number(r["train_loss"]),
            number(r["loss"]),
            number(r["accuracy"]),
            count(r["evaluated"]) if r["evaluated"] else ABSENT,
            str(len(r["clients"])),
            str(len(r["refused"])),
            size(r["up"]),
            size(r["down"]),
            size(r["total_bytes"]),
            duration(r["seconds"]),
            *(
                ()
                if facts.clock(s) is None
                else (
                    str(len(r.get("dropped", [])) + len(r.get("stragglers", []))),
                    duration(r.get("simulated_clock")),
                )
            ),
            *(
                (number(r.get("personal_accuracy")), count(r.get("personal_clients", 0)))
                if s.get("personal")
                else ()
            ),
        )
        for r in _some(s["rounds"], limit)
    ]


def _some(rows: list[T], limit: int) -> list[T]:
    """With a limit, at most so many: the first, the last and an even choice between."""
    return [rows[place] for place in few(len(rows), limit)] if limit else rows


def label_header(s: Summary) -> tuple[str, ...]:
    return (
        "label",
        "training examples",
        "held-out",
        "initial head" if facts.keeps_head(s) else "accuracy",
        *(("personal",) if any("personal" in row for row in s.get("by_label", [])) else ()),
    )


def label_rows(s: Summary, limit: int = 0) -> list[tuple[str, ...]]:
    """One row per label under `label_header`, from the most training examples to the fewest; with a limit,
    the first, the last and an even choice between.
    """
    own = len(label_header(s)) > 4
    return [
        (
            clean(row["label"]),
            count(row["train"]),
            count(row["examples"]),
            number(row["accuracy"]),
            *((number(row.get("personal")),) if own else ()),
        )
        for row in _some(s.get("by_label", []), limit)
    ]


DEVICE_HEADER = (
    "device class",
    "clients",
    "can train",
    "asked",
    "used",
    "dropped out",
    "too late",
    "mean time",
    "sent",
    "received",
)


def device_rows(s: Summary) -> list[tuple[str, ...]]:
    """One row per class of devices. The mean time is that of answers which came in time."""
    rows = []
    for c in s.get("devices", []):
        came = c["asked"] - c["dropped"] - c["stragglers"]
        mean = duration(c["seconds"] / came) if came else ABSENT
        counts = [count(c[key]) for key in ("clients", "able", "asked", "used", "dropped", "stragglers")]  # type: ignore[literal-required]
        rows.append((clean(c["name"]), *counts, mean, size(c["up"]), size(c["down"])))
    return rows


def unit_header(s: Summary) -> tuple[str, ...]:
    return ("unit", "rounds trained", "client updates", *(("score",) if _probed(s) else ()))


def unit_rows(s: Summary) -> list[tuple[str, ...]]:
    """How often each unit was trained, and its score at the last probe that was answered;
    nothing where all clients train all.
    """
    score = [
        (number(u["score"]) if "score" in u else ABSENT,) if _probed(s) else () for u in s.get("units", [])
    ]
    return [
        (clean(u["name"]), count(u["rounds"]), count(u["updates"]), *more)
        for u, more in zip(s.get("units", []), score)
    ]


def _probed(s: Summary) -> bool:
    return any("score" in u for u in s.get("units", []))


RANK_HEADER = ("rank", "numbers of a client", "rounds trained", "client updates")


def rank_rows(s: Summary) -> list[tuple[str, ...]]:
    """How often clients of each rank trained; nothing where all have the same."""
    return [
        tuple(count(r[key]) for key in ("rank", "numbers", "rounds", "updates")) for r in s.get("ranks", [])
    ]  # type: ignore[literal-required]


RIVAL_HEADER = ("baseline", "accuracy", "federated", "difference")


def rival_rows(s: Summary) -> list[tuple[Fact, str, str, str]]:
    return [
        (Fact(r.name, "", r.note), number(r.accuracy), number(r.federated), signed(r.gain))
        for r in facts.rivals(s)
    ]


def settings(s: Summary) -> dict[str, dict[str, str]]:
    """The job as text, section by section."""
    return {
        clean(name): {clean(k): setting(v) for k, v in section.items()} for name, section in s["job"].items()
    }


def setting(value: Any) -> str:
    """A job value as it would be written in the file, roughly."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "; ".join(f"{clean(k)} {setting(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)) and any(isinstance(v, dict) for v in value):
        return " | ".join(setting(v) for v in value)
    if isinstance(value, (list, tuple)):
        return ", ".join(setting(v) for v in value) or "(none)"
    return clean(value) if value not in ("", None) else "(empty)"
