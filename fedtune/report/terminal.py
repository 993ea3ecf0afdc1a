"""One run in the terminal, with the facts of the page."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedtune.report import facts, privacy, tables
from fedtune.report.facts import Fact
from fedtune.report.format import clean, count, number
from fedtune.report.privacy import Privacy
from fedtune.report.summary import Summary

MOST_ROUNDS = MOST_LABELS = 12
ROUND_HEADER = ("round", "train", "loss", "accuracy", "on", "clients", "refused", "total", "time")
"""As tables.ROUND_HEADER without the bytes of the round, short enough for 80 columns; `personal` is the
accuracy of what clients keep.
"""
DEVICE_HEADER = ("class", "clients", "able", "asked", "used", "dropped", "late", "mean", "sent", "received")
"""As tables.DEVICE_HEADER in one word each."""


def show(summary: Summary, console: Console) -> None:
    """Prints the result, key figures, baselines, rounds, clients, bytes, refusals,
    files and the privacy line.
    """
    s = summary
    console.print(Text(clean(s["title"]), style="bold"))
    console.print(Text(facts.headline(s), style="bold cyan"))
    for line, style in ((facts.verdict(s), ""), *((f"! {notice}", "yellow") for notice in facts.notices(s))):
        if line:
            console.print(Text(line, style=style))
    _facts(console, "", facts.key_figures(s))
    _facts(console, "How it was made", facts.model(s))
    rivals = [(row[0].name, *row[1:], row[0].note) for row in tables.rival_rows(s)]
    _rows(console, "Against baselines", (*tables.RIVAL_HEADER, ""), rivals, words=(0, 4))
    if facts.personal(s):
        _heading(console, "What clients keep")
        console.print(Padding(Text(facts.personal(s)), (0, 0, 0, 2)))
    timed = facts.clock(s) is not None
    own = bool(s.get("personal"))
    short = [
        (*row[:4], *(row[-2:-1] if own else ()), *row[4:7], *row[9:11], *(row[12:13] if timed else ()))
        for row in tables.round_rows(s, MOST_ROUNDS)
    ]
    _rows(
        console,
        "Rounds",
        (
            *ROUND_HEADER[:4],
            *(("personal",) if own else ()),
            *ROUND_HEADER[4:],
            *(("clock",) if timed else ()),
        ),
        short,
        words=(),
    )
    _clients(console, s)
    if facts.labels(s):
        _heading(console, "Labels")
        console.print(Padding(Text(facts.labels(s)), (0, 0, 0, 2), expand=False))
        console.print(table(tables.label_header(s), tables.label_rows(s, MOST_LABELS)))
    _devices(console, s)
    _rows(console, "Trained units", tables.unit_header(s), tables.unit_rows(s))
    _rows(console, "Ranks", tables.RANK_HEADER, tables.rank_rows(s))
    _facts(console, "Communication", facts.communication(s))
    _rows(
        console,
        "Refused updates",
        ("round", "client", "reason"),
        [(str(r), c, why) for r, c, why in facts.refusals(s)],
        words=(1, 2),
    )
    _rows(console, "Exported files", tables.EXPORT_HEADER, tables.exports(s), words=(0, 1))
    _heading(console, "Privacy")
    console.print(Padding(Text(facts.privacy(s)), (0, 0, 0, 2), expand=False))
    _accountants(console, s["privacy"])


def show_privacy(p: Privacy, title: str, console: Console) -> None:
    """Prints all that a summary says of privacy."""
    console.print(Text(clean(title), style="bold"))
    console.print(Text(privacy.sentence(p), style="bold cyan"))
    _accountants(console, p)
    if privacy.spread(p):
        _heading(console, "Clients")
        console.print(Padding(Text(privacy.spread(p)), (0, 0, 0, 2), expand=False))
    _rows(console, "By round", privacy.ROUND_HEADER, privacy.round_rows(p), words=())
    _rows(console, "What each kind of release cost", privacy.PART_HEADER, privacy.part_rows(p))
    if p.get("assumptions"):
        _heading(console, privacy.assumed(p))
        for line in p["assumptions"]:
            grid = Table.grid(padding=(0, 1))
            grid.add_row("  -", Text(clean(line)))
            console.print(grid)


def _accountants(console: Console, p: Privacy) -> None:
    rows = privacy.accountant_rows(p)
    if rows:
        console.print(table(privacy.ACCOUNTANT_HEADER, rows, (0, 2)))


def _devices(console: Console, s: Summary) -> None:
    if facts.fleet(s):
        _heading(console, "Devices")
        console.print(Padding(Text(facts.fleet(s)), (0, 0, 0, 2), expand=False))
        console.print(table(DEVICE_HEADER, tables.device_rows(s)))


def _clients(console: Console, s: Summary) -> None:
    _heading(console, "The clients")
    console.print(Padding(Text(facts.spread(s)), (0, 0, 0, 2), expand=False))
    worst = [
        (clean(name), number(ours), number(head), count(n)) for name, ours, head, n in facts.scores(s)[:5]
    ]
    _rows(console, "Served worst", ("client", "federated", "base + head", "held-out"), worst)


def _heading(console: Console, title: str) -> None:
    console.print()
    if title:
        console.print(Text(title, style="bold"))


def _facts(console: Console, title: str, facts_: Iterable[Fact]) -> None:
    _heading(console, title)
    grid = Table.grid(padding=(0, 2))
    for fact in facts_:
        grid.add_row(
            Text(fact.name, style="dim"), Text(fact.value, overflow="fold"), Text(fact.note, style="dim")
        )
    console.print(Padding(grid, (0, 0, 0, 2), expand=False))


def _rows(
    console: Console,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: Sequence[int] = (0,),
) -> None:
    if rows:
        _heading(console, title)
        console.print(table(header, rows, words))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> Table:
    """A plain table; columns in `words` hold text, the others figures. Cells are text, never markup."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for i, name in enumerate(header):
        made.add_column(Text(name), justify="left" if i in words else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
