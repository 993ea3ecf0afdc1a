"""The page's building blocks. Every function escapes the text it is given and returns finished HTML."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from fedtune.report.facts import Fact
from fedtune.report.format import clean
from fedtune.report.plots import Key, Plot

_STROKES = {"solid": "", "dashed": "6 3.5", "dotted": "1.6 3", "dashdot": "7 3 1.6 3"}


def document(title: str, eyebrow: str, lead: str, body: str, footer: str) -> str:
    """A whole page; `lead`, `body` and `footer` are HTML."""
    folder = files("fedtune.report")
    style = folder.joinpath("page.css").read_text(encoding="utf-8").rstrip()
    page = Template(folder.joinpath("page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=text(title), eyebrow=text(eyebrow), style=style, lead=lead, body=body, footer=footer
    )


def text(value: object) -> str:
    return escape(clean(value))


def paragraph(value: str, kind: str = "") -> str:
    return f"<p{_class(kind)}>{text(value)}</p>" if value else ""


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def section(name: str, title: str, *parts: str) -> str:
    """A section with a heading; an empty string without any part."""
    inside = "\n".join(part for part in parts if part)
    return (
        (
            f'<section id="{name}" aria-labelledby="{name}-heading">\n'
            f'<h2 id="{name}-heading">{text(title)}</h2>\n{inside}\n</section>'
        )
        if inside
        else ""
    )


def heading(title: str, *parts: str) -> str:
    """A heading below that of a section, with what stands under it; empty without that."""
    inside = "\n".join(part for part in parts if part)
    return f'<h3 class="under">{text(title)}</h3>\n{inside}' if inside else ""


def bullets(lines: Sequence[str], kind: str) -> str:
    return f"<ul{_class(kind)}>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>" if lines else ""


def tiles(facts: Iterable[Fact]) -> str:
    cells = "".join(
        f'<li><span class="name">{text(f.name)}</span> <span class="value">{text(f.value)}</span> '
        f'<span class="note">{text(f.note)}</span></li>'
        for f in facts
    )
    return f'<ul class="tiles" aria-label="Key figures">{cells}</ul>'


def definitions(facts: Iterable[Fact]) -> str:
    """Facts as a list of names and values."""
    rows = "".join(
        f"<dt>{text(f.name)}</dt><dd{_class('hash' if 'sha256' in f.name else '')}>{text(f.value)}"
        f"{f' <span>{text(f.note)}</span>' if f.note else ''}</dd>"
        for f in facts
    )
    return f'<dl class="facts">{rows}</dl>'


def glossary(words: Mapping[str, str]) -> str:
    return (
        '<dl class="glossary">'
        f"{''.join(f'<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>' for k, v in words.items())}</dl>"
    )


def card(*parts: str, title: str = "", kind: str = "") -> str:
    head = f"<h3>{text(title)}</h3>" if title else ""
    return f'<div class="{f"card {kind}".strip()}">{head}{"".join(parts)}</div>'


def grid(*parts: str) -> str:
    return f'<div class="grid">{"".join(parts)}</div>' if any(parts) else ""


def details(title: str, *parts: str) -> str:
    return f"<details><summary>{text(title)}</summary>{''.join(parts)}</details>" if any(parts) else ""


def table(
    label: str, header: Sequence[str], rows: Iterable[Sequence[object]], words: Sequence[int] = (0,)
) -> str:
    """A table in a box that scrolls by itself; columns in `words` hold text, the others figures.

    A `Fact` in a cell shows its name with the note below. Empty without rows.
    """
    kinds = [("t" if i else "") if i in words else "n" for i in range(len(header))]
    lines = [
        "".join(f"<td{_class(kind)}>{_cell(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        for row in rows
    ]
    if not lines:
        return ""
    head = "".join(
        f'<th scope="col"{_class(kind)}>{text(name)}</th>' for kind, name in zip(kinds, header, strict=True)
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if isinstance(value, Fact):
        return text(value.name) + (f" <small>{text(value.note)}</small>" if value.note else "")
    return text(value)


def figure(plot: Plot | None) -> str:
    """A plot with heading, legend and caption; empty for None."""
    if plot is None:
        return ""
    keys = "".join(
        (
            f"<li>{_swatch(key)}<span>"
            f"{text(key.name)}{f' <b>{text(key.value)}</b>' if key.value else ''}</span></li>"
        )
        for key in plot.legend
    )
    legend = f'<ul class="legend">{keys}</ul>' if keys else ""
    caption = f"<figcaption>{text(plot.note)}</figcaption>" if plot.note else ""
    return (
        f'<figure id="{plot.key}"><h3>{text(plot.title)}</h3><div class="plot">{plot.svg}</div>'
        f"{legend}{caption}</figure>"
    )


def _swatch(key: Key) -> str:
    paint = f"var(--{key.variable})"
    shapes = {
        "block": f'<rect x="7" y="0" width="12" height="12" rx="2" fill="{paint}"/>',
        "dot": f'<circle cx="13" cy="6" r="4.5" fill="{paint}"/>',
        "ring": f'<path d="M13 1.5 17.5 6 13 10.5 8.5 6Z" fill="none" stroke="{paint}" stroke-width="1.8"/>',
        "shade": "".join(
            f'<rect x="{i * 6.5}" y="0" width="6.5" height="12" fill="{paint}" opacity="{(i + 1) / 4}"/>'
            for i in range(4)
        ),
    }
    line = (
        f'<path d="M1 6H25" stroke="{paint}" stroke-width="2.4" '
        f'stroke-dasharray="{_STROKES.get(key.mark) or "none"}"/>'
    )
    return f'<svg viewBox="0 0 26 12" aria-hidden="true">{shapes.get(key.mark, line)}</svg>'
