"""Matplotlib figures as inline SVG that follows the page's colours.

Figures are drawn in sentinel colours which become CSS variables here, so one drawing serves light,
dark and print. Nothing of a figure points outside it: no fonts, no metadata, ids prefixed so that
several figures share a page.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fedtune.errors import EnvironmentProblem

try:
    import matplotlib
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator
except ModuleNotFoundError as e:
    raise EnvironmentProblem(
        f"the page needs {e.name}, which is not installed; pip install 'fedtune[sim]' brings it"
    ) from None

__all__ = [
    "Artist",
    "Axes",
    "FuncFormatter",
    "MaxNLocator",
    "MultipleLocator",
    "Path",
    "PathPatch",
    "colour",
    "drawing",
    "figure",
    "to_svg",
]
# The plots take matplotlib's names from here, so that its absence is met, and explained, in one place.

WIDTH = 380
"""Points; about the width of a phone, so that text keeps its size there."""
FONT = 12.5
VARIABLES = ("ink", "muted", "grid", "card", "fed", "head", "local", "majority", *(f"c{i}" for i in range(8)))


def colour(variable: str) -> str:
    """The sentinel that stands for a CSS variable of page.css."""
    return f"#0101{VARIABLES.index(variable):02x}"


@contextmanager
def drawing(prefix: str) -> Iterator[None]:
    """Settings in which a figure is made and written, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        # Glyphs come from the reader's fonts: that ours lack one only makes its width a guess.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": prefix,
                "text.parse_math": False,
                "font.size": FONT,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.spines.left": False,
                "axes.edgecolor": colour("grid"),
                "axes.labelcolor": colour("muted"),
                "xtick.color": colour("muted"),
                "ytick.color": colour("muted"),
                "text.color": colour("ink"),
                "axes.labelsize": FONT,
                "xtick.labelsize": FONT,
                "ytick.labelsize": FONT,
                "xtick.major.size": 0,
                "ytick.major.size": 0,
                "xtick.major.pad": 6,
                "ytick.major.pad": 6,
                "axes.labelpad": 6,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": colour("grid"),
                "grid.linewidth": 0.8,
                "figure.facecolor": "none",
                "axes.facecolor": "none",
                "lines.solid_capstyle": "round",
                "lines.solid_joinstyle": "round",
            }
        )
        yield


def figure(height: float, ratios: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    """An empty figure of the common width, and axes under each other with these
    relative heights and one x axis.
    """
    made = Figure(
        figsize=(WIDTH / 72, height / 72), layout=ConstrainedLayoutEngine(w_pad=3 / 72, h_pad=3 / 72)
    )
    FigureCanvasSVG(made)
    return made, list(
        made.subplots(len(ratios), 1, squeeze=False, sharex=True, height_ratios=list(ratios))[:, 0]
    )


def to_svg(made: Figure, prefix: str, title: str, description: str) -> str:
    """One inline `<svg>` element.

    Give matplotlib artists that carry data the gid "mark…" so that checks can find them.
    """
    buffer = io.StringIO()
    made.savefig(buffer, format="svg", metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in [c for c in parent if _local(c.tag) in ("metadata", "style")]:
            parent.remove(child)
    for node in root.iter():
        _rewrite(node, prefix)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{prefix}-title {prefix}-desc",
    }
    for tag, text in (("desc", description), ("title", title)):
        label = ET.Element(tag, {"id": f"{prefix}-{tag}"})
        label.text = text
        root.insert(0, label)
    return re.sub(r">\s+<", "><", ET.tostring(root, encoding="unicode"))


def _rewrite(node: ET.Element, prefix: str) -> None:
    node.tag = _local(node.tag)
    for name, value in list(node.attrib.items()):
        del node.attrib[name]
        local = _local(name)
        if local == "id":
            value = f"{prefix}-{value}"
        elif local == "href":
            value = value.replace("#", f"#{prefix}-")
        elif local == "clip-path":
            value = value.replace("url(#", f"url(#{prefix}-")
        elif local == "style":
            value = _style(value)
        elif local in ("d", "x", "y", "width", "height", "transform"):
            value = _shorter(value)
        node.set(local, value)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _style(style: str) -> str:
    kept = [part.strip() for part in style.split(";") if not part.strip().startswith("font-family")]
    return re.sub(r"#0101([0-9a-f]{2})", lambda m: f"var(--{VARIABLES[int(m[1], 16)]})", "; ".join(kept))


def _shorter(numbers: str) -> str:
    """Coordinates to a hundredth of a point: a third of the bytes, no visible change."""
    return " ".join(
        re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), numbers).split()
    )
