"""Plots of the clients: how well each is served, and who holds how much of what."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np

from fedtune.common.metrics import worst_tenth
from fedtune.report import facts
from fedtune.report.format import clean, count, number, percent, plural, short
from fedtune.report.plots import DASHES, Key, Plot
from fedtune.report.summary import Population, SplitClient, Summary
from fedtune.report.svg import Artist, Axes, MaxNLocator, Path, PathPatch, colour, drawing, figure, to_svg

ROWS, COLUMNS, LABELS, SHADES = 36, 120, 8, 8
"""Most clients drawn by name, most columns of a heat map, most labels with a
colour each, steps of shading.
"""


def distribution(s: Summary, prefix: str = "run") -> Plot | None:
    """Accuracy of each client, or how many clients have which; None without any figure."""
    rows = facts.scores(s)
    if not rows:
        return None
    title, key = f"{facts.metric(s).capitalize()} of each client", f"{prefix}-clients"
    has_head = any(facts.is_number(head) for _, _, head, _ in rows)
    worst, mean = worst_tenth(a for _, a, _, _ in rows), float(np.mean([a for _, a, _, _ in rows]))
    if "whole" in s["final"]:
        worst, mean = (
            all_ if all_ is not None else listed
            for all_, listed in ((s["final"]["worst_tenth"], worst), (s["final"]["mean"], mean))
        )
    marks = (("worst tenth", worst, "dotted"), ("mean over clients", mean, "solid"))
    with drawing(key):
        made, (axes,) = figure(64 + 17 * len(rows) if len(rows) <= ROWS else 270)
        (_dots if len(rows) <= ROWS else _histogram)(axes, rows)
        for name, value, dash in marks:
            axes.axvline(
                value,
                color=colour("ink"),
                linestyle=DASHES[dash],
                linewidth=1.4,
                gid=f"mark-{name.split()[0]}",
                zorder=2,
            )
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel(facts.metric(s))
        text = to_svg(made, key, title, facts.spread(s))
    mark = "dot" if len(rows) <= ROWS else "block"
    legend = [Key("fed", mark, "federated")] + (
        [Key("head", "ring" if mark == "dot" else "solid", "base + head")] if has_head else []
    )
    drawn = (
        (
            f"{count(len(rows))} of {plural(s['final']['whole']['clients'], 'client')}, "
            "evenly from worst to best."
        )
        if "whole" in s["final"]
        else ""
    )
    return Plot(
        key,
        title,
        text,
        (*legend, *(Key("ink", dash, name, number(value)) for name, value, dash in reversed(marks))),
        drawn,
    )


def _dots(axes: Axes, rows: Sequence[tuple[str, float, float | None, int]]) -> None:
    ys = np.arange(len(rows))[::-1]
    pairs = [
        (head, float(y))
        for y, (_, _, head, _) in zip(ys, rows, strict=True)
        if head is not None and facts.is_number(head)
    ]
    ends = {y: head for head, y in pairs}
    ours = [accuracy for _, accuracy, _, _ in rows]
    axes.hlines(
        ys,
        [ends.get(y, x) for x, y in zip(ours, ys, strict=True)],
        ours,
        color=colour("grid"),
        linewidth=2.4,
        zorder=2.5,
    )
    if pairs:
        axes.plot(
            *zip(*pairs, strict=True),
            linestyle="none",
            marker="D",
            markersize=5,
            markerfacecolor=colour("card"),
            markeredgecolor=colour("head"),
            markeredgewidth=1.5,
            gid="mark-head",
            zorder=3,
        )
    axes.plot(
        ours,
        ys,
        linestyle="none",
        marker="o",
        markersize=6.5,
        color=colour("fed"),
        gid="mark-federated",
        zorder=4,
    )
    axes.set_yticks(ys, [short(name, 18) for name, *_ in rows], fontsize=11)
    axes.set_ylim(-0.8, len(rows) - 0.2)
    axes.grid(axis="y", visible=False)


def _histogram(axes: Axes, rows: Sequence[tuple[str, float, float | None, int]]) -> None:
    ours, heads = (
        [a for _, a, _, _ in rows],
        [h for _, _, h, _ in rows if h is not None and facts.is_number(h)],
    )
    low, high = min([*ours, *heads]), max([*ours, *heads])
    bins = np.linspace(low, high if high > low else low + 0.01, 21)
    counts, width = np.histogram(ours, bins)[0], bins[1] - bins[0]
    _name(
        axes.bar(bins[:-1] + width / 2, counts, 0.9 * width, color=colour("fed"), alpha=0.75),
        "mark-federated",
    )
    if heads:
        axes.stairs(np.histogram(heads, bins)[0], bins, color=colour("head"), linewidth=1.8, gid="mark-head")
    axes.set_ylabel("clients")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="x", visible=False)


def split(s: Summary, prefix: str = "run") -> Plot | None:
    """Who holds what: a bar per client by label, or for many clients or labels, sizes above a heat map."""
    # stable: clients keep their order within a group
    clients = sorted(s["split"], key=lambda c: clean(c["natural"] or ""))
    if not clients:
        return None
    labels = (
        [clean(label) for label in s["labels"]]
        if all(len(c["labels"]) == len(s["labels"]) for c in clients)
        else []
    )
    drawn = _bars if len(clients) <= ROWS and len(labels) <= LABELS else _map
    key, title = f"{prefix}-split", "Who holds how much of what" if labels else "Who holds how much"
    with drawing(key):
        return drawn(key, title, clients, labels, describe(s, clients, labels))


def _parts(clients: Sequence[SplitClient], labels: Sequence[str]) -> tuple[np.ndarray, list[Key]]:
    """Examples per client and part, and the legend: by label, or without labels by training and held-out."""
    if labels:
        return np.array([c["labels"] for c in clients]), [
            Key(f"c{i}", "block", label) for i, label in enumerate(labels[:LABELS])
        ]
    return np.array([[c["train"], c["held_out"]] for c in clients]), [
        Key("c0", "block", "training"),
        Key("c1", "block", "held-out"),
    ]


def _groups(clients: Sequence[SplitClient]) -> list[tuple[str, int]]:
    """(natural value, clients) in order; empty when there is nothing to group by."""
    groups = [
        (clean(name), len(list(members)))
        for name, members in groupby(clients, key=lambda c: c["natural"] or "")
    ]
    return groups if any(name for name, _ in groups) and len(groups) < len(clients) else []


def describe(s: Summary, clients: Sequence[SplitClient], labels: Sequence[str]) -> str:
    """The split in words; `clients` are those listed."""
    if "population" in s:
        return _describe_many(s["population"], len(clients), labels)
    sizes = [c["train"] + c["held_out"] for c in clients]
    text = (
        f"{plural(sum(sizes), 'example')} over {plural(len(clients), 'client')}, from {count(min(sizes))} "
        f"to {count(max(sizes))} each"
    )
    groups = _groups(clients)
    if groups:
        text += f"; {plural(len(groups), 'group')}: {', '.join(f'{name} ({n})' for name, n in groups[:8])}"
        text += f" and {len(groups) - 8} more" if len(groups) > 8 else ""
    return text + (f"; {plural(len(labels), 'label')}." if labels else ".")


def _describe_many(all_: Population, listed: int, labels: Sequence[str]) -> str:
    least, *_, most = all_["train_quantiles"]
    text = (
        f"{plural(all_['train'] + all_['held_out'], 'example')} over {plural(all_['clients'], 'client')}, "
        f"from {count(least)} to {count(most)} to train on"
    )
    text += f"; {plural(len(labels), 'label')}" if labels else ""
    return f"{text}. Drawn: {count(listed)} of the clients, evenly spaced."


def _bars(key: str, title: str, clients: Sequence[SplitClient], labels: Sequence[str], words: str) -> Plot:
    values, legend = _parts(clients, labels)
    heights, ticks = list(_slots(clients)), []
    made, (axes,) = figure(64 + 17 * len(heights))
    left, ys = np.zeros(len(clients)), []
    for slot, (index, name) in enumerate(heights):
        if index is None:
            axes.text(
                0,
                -slot,
                short(name, 40),
                va="center",
                ha="left",
                fontsize=11,
                fontweight="bold",
                color=colour("ink"),
            )
        else:
            ys.append(-slot)
            ticks.append((-slot, short(name, 18)))
    for part in range(values.shape[1]):
        bars = axes.barh(
            ys,
            values[:, part],
            left=left,
            height=0.78,
            color=colour(legend[part].variable),
            edgecolor=colour("card"),
            linewidth=0.9,
        )
        _name(bars, f"mark-part-{part}")
        left += values[:, part]
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=11)
    axes.set_ylim(-len(heights) + 0.4, 0.6)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("examples")
    totals = values.sum(axis=0)
    legend = [Key(k.variable, k.mark, k.name, count(int(n))) for k, n in zip(legend, totals, strict=True)]
    return Plot(key, title, to_svg(made, key, title, words), tuple(legend), words)


def _slots(clients: Sequence[SplitClient]) -> Iterator[tuple[int | None, str]]:
    """Rows from the top: a client's index and name, or None and the name of the group that begins."""
    groups, index = _groups(clients), 0
    for name, members in groups or [("", len(clients))]:
        if groups:
            yield None, name or "(no value)"
        for _ in range(members):
            yield index, clean(clients[index]["name"])
            index += 1


def _name(patches: Iterable[Artist], prefix: str) -> None:
    """A gid each: given to bar, one gid would stand on every patch."""
    for i, patch in enumerate(patches):
        patch.set_gid(f"{prefix}-{i}")


def _map(key: str, title: str, clients: Sequence[SplitClient], labels: Sequence[str], words: str) -> Plot:
    values, _ = _parts(clients, labels)
    each = -(-len(clients) // COLUMNS)
    starts = np.arange(0, len(clients), each)
    pooled = np.add.reduceat(values, starts, axis=0) / np.diff([*starts, len(clients)])[:, None]
    rows, names = _rows(pooled, labels)
    tall, most = max(17 * len(names), 100), float(rows.max(initial=0)) or 1.0
    made, axes = figure(140 + tall, (90, tall)) if names else figure(200)
    _name(
        axes[0].bar(
            np.arange(len(pooled)) + 0.5, pooled.sum(axis=1), width=0.86, color=colour("fed"), linewidth=0
        ),
        "mark-size",
    )
    axes[0].set_ylabel("examples")
    axes[0].yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes[0].grid(axis="x", visible=False)
    if names:
        _heat(axes[1], rows / most, names)
    _group_axis(axes[-1], clients, 1 / each)
    per = "" if each == 1 else f" Each column is {each} clients, averaged."
    legend = (
        (Key("fed", "shade", "share of a client's examples", f"0 to {percent(most, 1)}"),) if names else ()
    )
    return Plot(key, title, to_svg(made, key, title, words), legend, words + per)


def _rows(pooled: np.ndarray, labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Shares [label, column] of the largest labels and of all others together."""
    if not labels:
        return np.zeros((0, 0)), []
    shares = (pooled / np.maximum(pooled.sum(axis=1, keepdims=True), 1e-9)).T
    if len(labels) <= 14:
        return shares, [short(label, 16) for label in labels]
    largest = np.sort(np.argsort(-pooled.sum(axis=0), kind="stable")[:12])
    others = np.delete(shares, largest, axis=0).sum(axis=0, keepdims=True)
    return np.concatenate([shares[largest], others]), [
        *(short(labels[i], 16) for i in largest),
        f"{len(labels) - 12} others",
    ]


def _heat(axes: Axes, shares: np.ndarray, names: Sequence[str]) -> None:
    steps = np.ceil(shares * SHADES - 1e-9).astype(int)
    for step in range(1, SHADES + 1):
        cells = [
            Path([(x, y), (x + 1, y), (x + 1, y + 0.9), (x, y + 0.9), (x, y)], closed=True)
            for y, x in np.argwhere(steps == step)
        ]
        if cells:  # one path per shade: thousands of cells stay a few kilobytes
            axes.add_patch(
                PathPatch(
                    Path.make_compound_path(*cells),
                    facecolor=colour("fed"),
                    alpha=step / SHADES,
                    linewidth=0,
                    gid=f"mark-heat-{step}",
                )
            )
    axes.set_ylim(len(names), -0.1)
    axes.set_yticks(np.arange(len(names)) + 0.45, names, fontsize=11)
    axes.grid(visible=False)


def _group_axis(axes: Axes, clients: Sequence[SplitClient], scale: float) -> None:
    groups, edge, centres = _groups(clients), 0.0, []
    axes.set_xlim(0, len(clients) * scale)
    for name, members in groups:
        centres.append((edge + members * scale / 2, short(name, max(3, 48 // len(groups)))))
        edge += members * scale
        if edge < len(clients) * scale:
            axes.axvline(edge, color=colour("muted"), linewidth=0.8)
    named = centres if len(groups) <= 8 else []
    axes.set_xticks([x for x, _ in named], [name for _, name in named])
    axes.set_xlabel("clients" if not groups else f"clients, by group ({len(groups)})")
