"""Plots of privacy: what was spent round by round, and by whom."""

import math

import numpy as np

from fedtune.report import privacy
from fedtune.report.format import bound
from fedtune.report.plots import DASHES, Key, Level, Line, Plot, curves
from fedtune.report.privacy import Privacy
from fedtune.report.svg import MaxNLocator, colour, drawing, figure, to_svg

BINS = 20


def spending(p: Privacy, prefix: str = "run") -> Plot | None:
    """Epsilon against rounds, with what the job allows as a level.

    None where it is infinite or nothing has left.
    """
    points = [(float(row["round"]), privacy.value(row["epsilon"])) for row in p.get("rounds", [])]
    if not points or not all(math.isfinite(y) for _, y in points):
        return None
    whose = f"Of {p['client']}, which lost most." if p.get("client") else ""
    line = Line("spent", "fed", "solid", [(0.0, 0.0), *points] if points[0][0] > 0 else points)
    allowed = [Level("allowed", "head", "dashed", p["target"])] if p.get("target") else []
    return curves(
        f"{prefix}-epsilon-rounds", "Epsilon against rounds", "round", [line], allowed, whose, bound
    )


def distribution(p: Privacy, prefix: str = "run") -> Plot | None:
    """How many clients have lost how much. None where all have lost the same."""
    rows = [(privacy.value(row["epsilon"]), row["clients"]) for row in p.get("spread", [])]
    if len(rows) < 2 or not all(math.isfinite(x) for x, _ in rows):
        return None
    key, title, worst = f"{prefix}-epsilon-clients", "Epsilon of the clients", max(x for x, _ in rows)
    with drawing(key):
        made, (axes,) = figure(250)
        bins = np.linspace(min(x for x, _ in rows), worst, BINS + 1)
        counts, width = (
            np.histogram([x for x, _ in rows], bins, weights=[n for _, n in rows])[0],
            bins[1] - bins[0],
        )
        for i, bar in enumerate(
            axes.bar(bins[:-1] + width / 2, counts, 0.9 * width, color=colour("fed"), alpha=0.75)
        ):
            if counts[i]:
                bar.set_gid(f"mark-clients-{i}")
        axes.axvline(
            worst, color=colour("ink"), linestyle=DASHES["dotted"], linewidth=1.4, gid="mark-worst", zorder=2
        )
        axes.set_xlabel("epsilon")
        axes.set_ylabel("clients")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="x", visible=False)
        text = to_svg(made, key, title, privacy.spread(p))
    return Plot(
        key,
        title,
        text,
        (Key("fed", "block", "clients"), Key("ink", "dotted", "most, the run's", privacy.shown(worst))),
    )
