"""Plots of learning: accuracy and loss against rounds, bytes and simulated time."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.report import facts
from fedtune.report.format import clean, duration, number, plural, size
from fedtune.report.summary import Summary
from fedtune.report.svg import (
    Axes,
    FuncFormatter,
    MaxNLocator,
    MultipleLocator,
    colour,
    drawing,
    figure,
    to_svg,
)

Point = tuple[float, float]
DASHES = {"solid": "-", "dashed": (0, (5, 3)), "dotted": (0, (1.2, 2.4)), "dashdot": (0, (6, 2.4, 1.2, 2.4))}
MANY_POINTS = 30


@dataclass(frozen=True)
class Key:
    """One entry of a legend: variable of its colour, how it is drawn (a dash,
    "block" or "dot"), name, figure.
    """

    variable: str
    mark: str
    name: str
    value: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawn plot, and what stands around it on the page."""

    key: str
    title: str
    svg: str
    legend: tuple[Key, ...]
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A series to draw."""

    name: str
    variable: str
    dash: str
    points: Sequence[Point]

    @property
    def finite(self) -> list[Point]:
        return [(x, y) for x, y in self.points if facts.is_number(y)]


@dataclass(frozen=True)
class Level:
    """A horizontal line at a baseline."""

    name: str
    variable: str
    dash: str
    value: float


AXES = {
    "round": ("rounds", "round"),
    "total_bytes": ("bytes", "sent in all"),
    "simulated_clock": ("time", "simulated time"),
}
"""What curves are drawn against: a key of a round, its unit, and the label of the axis."""


def learning(s: Summary, prefix: str = "run") -> list[Plot]:
    """Accuracy and loss against rounds, against bytes and against simulated time;
    without the ones that have no points.
    """
    metric, found = facts.metric(s), []
    frame = size(s["communication"]["frame_bytes"])
    for axis, against, note in (
        ("round", "against rounds", ""),
        (
            "total_bytes",
            "against bytes sent",
            f"Both directions, all clients, the frame of {frame} per client included.",
        ),
        (
            "simulated_clock",
            "against simulated time",
            "On the job's classes of devices; measuring takes none of it.",
        ),
    ):
        shared = "federated, initial head" if facts.keeps_head(s) else "federated"
        ours = [
            Line(shared, "fed", "solid", series(s, axis, "accuracy")),
            Line("personal", "c3", "solid", series(s, axis, "personal_accuracy")),
        ]
        ours = ours[::-1] if facts.keeps_head(s) else ours
        losses = [
            Line("held-out", "fed", "solid", series(s, axis, "loss")),
            Line("training", "muted", "dashed", series(s, axis, "train_loss")),
        ]
        unit = AXES[axis][0]
        found.append(
            curves(f"{prefix}-accuracy-{unit}", f"Held-out {metric} {against}", axis, ours, levels(s), note)
        )
        found.append(curves(f"{prefix}-loss-{unit}", f"Loss {against}", axis, losses, [], note))
    return [plot for plot in found if plot is not None]


def series(s: Summary, x: str, y: str) -> list[Point]:
    """The rounds where `y` was measured, as points; NaN stays, as a gap in the line."""
    return [(r[x], r[y]) for r in s["rounds"] if x in r and r.get(y) is not None]  # type: ignore[literal-required]


def levels(s: Summary) -> list[Level]:
    """The baselines as horizontal lines; beside "alone", the federated model on those same clients."""
    styles = {"majority": ("majority", "dotted"), "head": ("head", "dashed"), "local": ("local", "dashdot")}
    found = []
    for rival in facts.rivals(s):
        variable, dash = styles[rival.key]
        found.append(Level(rival.name, variable, dash, rival.accuracy))
        if rival.key == "local" and rival.federated is not None:
            found.append(Level("federated, same clients", "fed", "dotted", rival.federated))
    return [level for level in found if facts.is_number(level.value)]


def curves(
    key: str,
    title: str,
    axis: str,
    lines: Sequence[Line],
    flat: Sequence[Level],
    note: str = "",
    show: Callable[[float], str] = number,
) -> Plot | None:
    """Lines against one of AXES, with flat lines for baselines; `show` writes their figures.

    None when no line has a number.
    """
    lines = [line for line in lines if line.finite]
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    # Frames go out before the first round and may dwarf all that follows;
    # the curve then needs the whole width.
    start = min(xs) if axis == "total_bytes" and min(xs) > 0.3 * max(xs) else 0
    if start:
        note = f"{note} The axis starts at {size(start)}.".strip()
    with drawing(key):
        made, (axes,) = figure(250)
        for i, line in enumerate(lines):
            _draw(axes, line, i)
        for i, level in enumerate(flat):
            axes.axhline(
                level.value,
                color=colour(level.variable),
                linestyle=DASHES[level.dash],
                linewidth=1.6,
                gid=f"mark-level-{i}",
                zorder=2,
            )
        _axis(axes, axis, start, max(xs))
        text = to_svg(made, key, title, describe(lines, flat, show))
    legend = [Key(line.variable, line.dash, line.name, show(line.points[-1][1])) for line in lines]
    legend += [Key(level.variable, level.dash, level.name, show(level.value)) for level in flat]
    return Plot(key, title, text, tuple(legend), note)


def _draw(axes: Axes, line: Line, i: int) -> None:
    look: dict[str, Any] = {"color": colour(line.variable), "markersize": 4.5, "zorder": 3}
    dots = "o" if len(line.points) <= MANY_POINTS and line.dash == "solid" else ""
    axes.plot(
        *zip(*line.points, strict=True),
        linestyle=DASHES[line.dash],
        linewidth=2.2,
        marker=dots,
        gid=f"mark-line-{i}",
        **look,
    )
    if not dots:
        x, y = line.finite[-1]
        axes.plot([x], [y], linestyle="none", marker="o", gid=f"mark-end-{i}", **look)


def _axis(axes: Axes, axis: str, start: float, furthest: float) -> None:
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.08)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=axis == "round"))
    reach = max(furthest - start, 1)
    axes.set_xlim(start - 0.02 * reach, start + 1.03 * reach)
    axes.set_xlabel(AXES[axis][1])
    if axis == "total_bytes":
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: size(x) if x > 0 else "0" if x == 0 else "")
        )
    if axis == "simulated_clock":
        axes.xaxis.set_major_locator(MultipleLocator(_even_time(furthest)))
        axes.xaxis.set_major_formatter(
            FuncFormatter(
                lambda x, _: re.sub(r" 0 (s|min)$", "", duration(x)) if x > 0 else "0" if x == 0 else ""
            )
        )


def _even_time(seconds: float) -> float:
    """A step of whole seconds, minutes or hours that divides a time into four to five parts, or nearly."""
    steps = [unit * n for unit in (1, 60) for n in (1, 2, 5, 10, 15, 20, 30)] + [
        3600.0 * n * 10**e for e in range(6) for n in (1, 2, 5)
    ]
    return next((step for step in steps if seconds / step <= 5), steps[-1])


def describe(lines: Sequence[Line], flat: Sequence[Level], show: Callable[[float], str] = number) -> str:
    """The plot in words, for those who do not see it."""
    parts = []
    for line in lines:
        first, last, best = line.points[0][1], line.points[-1][1], max(y for _, y in line.finite)
        parts.append(
            f"{clean(line.name)}: {plural(len(line.points), 'point')}, from {show(first)} "
            f"to {show(last)}, highest {show(best)}"
        )
    parts += [f"horizontal line {level.name} at {show(level.value)}" for level in flat]
    return "; ".join(parts) + "."
