"""Several runs beside each other, in the terminal and as a page."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from fedtune.errors import ContractError
from fedtune.report import facts, privacy, tables, terminal
from fedtune.report.format import ABSENT, clean, count, duration, number, plural, size, unique
from fedtune.report.summary import Summary

CLOCK, PERSONAL = "simulated time", "personal accuracy"
"""Further columns where any of the runs has device classes, or clients that predict
with something of their own.
"""
HEADER = (
    "run",
    "accuracy",
    "worst tenth",
    "loss",
    "rounds",
    "sent in all",
    "one update",
    "numbers trained",
    "epsilon",
)
COLOURS = ("fed", "head", "local", "c3", "c1", "majority", "c4", "c5")
DASHES = ("solid", "dashed", "dashdot", "dotted")


def table(summaries: Sequence[Summary], console: Console) -> None:
    """Prints the final figures of each run, what sets the jobs apart,
    and what makes the runs hard to compare.
    """
    console.print(Text(headline(summaries), style="bold cyan"))
    for caution in cautions(summaries):
        console.print(Text(f"! {caution}", style="yellow"))
    console.print(terminal.table(header(summaries), rows(summaries)))
    changed = differences(summaries)
    if changed:
        console.print(Text("Settings that differ", style="bold"))
        console.print(terminal.table(("setting", *names(summaries)), changed, range(len(summaries) + 1)))
    else:
        console.print("The jobs have the same settings.")


def render(summaries: Sequence[Summary]) -> str:
    """The comparison as one page. The same summaries give the same text."""
    from fedtune.report import html, plots  # here, so that the table needs no matplotlib

    drawn = [
        plots.curves(
            f"compare-{unit}",
            f"Held-out accuracy against {against}",
            axis,
            [
                plots.Line(
                    f"{name}, personal" if _own(s, summaries) else name,
                    COLOURS[i % len(COLOURS)],
                    DASHES[i // len(COLOURS) % len(DASHES)],
                    plots.series(s, axis, "personal_accuracy" if _own(s, summaries) else "accuracy"),
                )
                for i, (name, s) in enumerate(zip(names(summaries), summaries, strict=True))
            ],
            [],
            note,
        )
        for unit, against, axis, note in (
            ("rounds", "rounds", "round", ""),
            ("bytes", "bytes sent", "total_bytes", "Both directions, all clients, frames included."),
            ("time", "simulated time", "simulated_clock", "Of the runs with classes of devices."),
        )
    ]
    lead = (
        f'<p class="headline">{html.text(headline(summaries))}</p>'
        f"{html.bullets(cautions(summaries), 'notices')}"
    )
    changed = differences(summaries)
    body = "\n".join(
        (
            html.section(
                "final", "Final figures", html.table("Final figures", header(summaries), rows(summaries))
            ),
            html.section(
                "learning",
                "Learning",
                html.grid(*(html.figure(plot) for plot in drawn))
                or html.paragraph("No round has been measured yet."),
            ),
            html.section(
                "settings",
                "Settings that differ",
                html.table("Settings", ("setting", *names(summaries)), changed, range(len(summaries) + 1))
                or html.paragraph("None: the jobs are the same."),
            ),
        )
    )
    footer = f"<p>Written by fedtune from {plural(len(summaries), 'run')}.</p>"
    return html.document(
        f"Comparison of {plural(len(summaries), 'run')}", "fedtune comparison", lead, body, footer
    )


def names(summaries: Sequence[Summary]) -> list[str]:
    """A distinct name for each run."""
    return unique([clean(s["title"]) or "run" for s in summaries])


def headline(summaries: Sequence[Summary]) -> str:
    """Which run is most accurate and which sent least."""
    if not summaries:
        raise ContractError("a comparison needs at least one run")
    named = list(zip(names(summaries), summaries, strict=True))
    figures = [
        (facts.leading(s, _own(s, summaries))[0], name, _over(s) if _own(s, summaries) else "")
        for name, s in named
    ]
    measured = [figure for figure in figures if facts.is_number(figure[0])]
    least = min(((_sent(s), name) for name, s in named), key=lambda pair: pair[0])
    if not measured:
        return "No run has been evaluated yet."
    best = max(measured, key=lambda pair: pair[0] or 0.0)
    if best[1] == least[1] and len(named) > 1:
        return (
            f"“{best[1]}” is the most accurate, {number(best[0])}{best[2]}, and sent least, {size(least[0])}."
        )
    text = f"“{best[1]}” is the most accurate: {number(best[0])}{best[2]}"
    return f"{text}; “{least[1]}” sent least: {size(least[0])}." if len(named) > 1 else f"{text}."


def _sent(s: Summary) -> int:
    return s["communication"]["up"] + s["communication"]["down"]


def header(summaries: Sequence[Summary]) -> tuple[str, ...]:
    timed, own = any(facts.clock(s) is not None for s in summaries), any("personal" in s for s in summaries)
    return (*HEADER, *([CLOCK] if timed else []), *([PERSONAL] if own else []))


def rows(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """Final figures, one row per run under `header`."""
    columns = header(summaries)
    return [
        (
            name,
            *_figures(s, _own(s, summaries)),
            count(facts.rounds_done(s)) + ("" if s["complete"] else f" of {count(facts.rounds_planned(s))}"),
            size(_sent(s)),
            size(s["communication"]["update_bytes"]),
            count(s["communication"]["trainable_numbers"]),
            privacy.shown(s["privacy"]["epsilon"]),
            *([duration(facts.clock(s))] if CLOCK in columns else []),
            *([_personal(s)] if PERSONAL in columns else []),
        )
        for name, s in zip(names(summaries), summaries, strict=True)
    ]


def _own(s: Summary, summaries: Sequence[Summary]) -> bool:
    """Whether the figures of this run are those of what clients predict with. Beside a run whose clients keep
    their heads, which has no others, all that have such figures are compared by them.
    """
    return facts.is_personal(s) and any(map(facts.keeps_head, summaries))


def _over(s: Summary) -> str:
    """Whose figure a personal one is: of fewer examples than those of the global model where
    not all clients took part.
    """
    found = s.get("personal")
    return (
        " personal"
        if found is None or found["clients"] == found["of"]
        else f" personal (of the {count(found['clients'])} of {plural(found['of'], 'client')} that took part)"
    )


def _figures(s: Summary, own: bool) -> tuple[str, str, str]:
    ours, worst, loss = (number(value) for value in facts.leading(s, own))
    return ours if ours == ABSENT or not own else f"{ours} personal", worst, loss


def _personal(s: Summary) -> str:
    found = s.get("personal")
    return ABSENT if found is None else f"{number(found['accuracy'])} of {plural(found['clients'], 'client')}"


def cautions(summaries: Sequence[Summary]) -> list[str]:
    """What keeps the figures from being like for like."""
    checks = (
        (
            "The runs have different tasks or labels: their accuracies mean different things.",
            lambda s: (s["task"], s["labels"]),
        ),
        (
            "The runs have different held-out data or clients: differences may come from the data.",
            lambda s: (
                s.get("population"),
                [(c["name"], c["train"], c["held_out"], c["labels"]) for c in s["split"]],
            ),
        ),
        ("The runs start from different base models.", lambda s: s["base"]["sha256"]),
        ("Not all runs are finished.", lambda s: s["complete"]),
        (
            (
                "Beside a run whose clients keep their heads, accuracy, worst tenth and loss are personal "
                "where clients keep something: of what each predicts with, over those that took part."
            ),
            lambda s: _own(s, summaries),
        ),
    )
    found = [line for line, key in checks if any(key(s) != key(summaries[0]) for s in summaries)]
    return found if found or all(s["complete"] for s in summaries) else ["No run is finished."]


def differences(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """(section.key, its value in each run) where the jobs disagree; titles aside."""
    flat = [
        {
            f"{section}.{key}": value
            for section, values in tables.settings(s).items()
            for key, value in values.items()
        }
        for s in summaries
    ]
    keys = dict.fromkeys(key for job in flat for key in job)
    table_ = [(key, *(job.get(key, ABSENT) for job in flat)) for key in keys if key != "report.title"]
    return [row for row in table_ if len(set(row[1:])) > 1]
