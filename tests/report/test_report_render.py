"""The page, the terminal and the comparison, on every kind of summary."""

import copy
import io
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser

import pytest
from report_samples import CASES, HOSTILE, rendered, sample
from rich.console import Console

from fedtune.report import compare, facts, page, terminal

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Checks that tags nest and collects text, ids, references and tag names."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{name} on {tag}"
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "clip-path", "aria-labelledby"):
                self.references += (
                    re.findall(r"#([^\s)]+)", value or "")
                    if name != "aria-labelledby"
                    else (value or "").split()
                )

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def shown(case: str, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    terminal.show(CASES[case](), console)
    return console.file.getvalue()


@pytest.mark.parametrize("case", CASES)
def test_page_is_one_sound_file(case: str) -> None:
    html = rendered(case)
    read = Reader(html)
    assert len(read.ids) == len(set(read.ids))
    assert set(read.references) <= set(read.ids)
    assert not read.tags & {"script", "img", "iframe", "object", "embed", "base", "form"}
    # the hostile sample holds that text; nothing else may
    assert "#0101" not in re.sub(r"fill: #010103", "", html)
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?\s*(?:https?:)?//|@import|url\((?!#)", html)
    assert not re.search(r"https?://", html)


@pytest.mark.parametrize("case", CASES)
def test_page_and_terminal_say_the_same(case: str) -> None:
    s, html, plain = CASES[case](), Reader(rendered(case)).text, " ".join(shown(case).split())
    wanted = [
        facts.headline(s),
        facts.verdict(s),
        facts.privacy(s),
        facts.spread(s),
        facts.fleet(s),
        *facts.notices(s),
    ]
    for fact in [*facts.key_figures(s), *facts.communication(s)]:
        wanted += [fact.name, fact.value, fact.note]
    for text in wanted:
        text = " ".join(text.split())
        assert text in html.replace(" .", "."), text
        assert text in plain, text


@pytest.mark.parametrize("case", ["usual", "refused", "hostile", "causal", "many-clients"])
def test_terminal_fits_narrow_windows(case: str) -> None:
    assert max(len(line) for line in shown(case, 60).splitlines()) <= 60


@pytest.mark.parametrize("case", ["one-client", "causal-many"])
def test_same_summary_same_page(case: str) -> None:
    assert page.render(CASES[case]()) == rendered(case)


def test_rendering_leaves_the_summary_alone() -> None:
    made = sample(clients=3, rounds=2)
    before = copy.deepcopy(made)
    page.render(made)
    compare.render([made, made])
    assert made == before


def test_hostile_strings_stay_text() -> None:
    html = rendered("hostile")
    assert (
        "<script" not in html.lower() and "<img" not in html and "\x1b" not in html and "\u202e" not in html
    )
    assert HOSTILE in Reader(html).text  # shown, as text
    assert ">fill: #010103</text>" in html  # a name that looks like a sentinel colour is not taken for one
    assert "$x^{$" in unescape(html) and "${title}" in html
    plain = shown("hostile")
    assert "\x1b" not in plain and "\x07" not in plain and "[bold red]x[/]" in plain


@pytest.mark.parametrize("case", CASES)
def test_comparison_of_every_kind(case: str) -> None:
    runs = [sample(), CASES[case]()]
    read = Reader(compare.render(runs))
    assert len(read.ids) == len(set(read.ids)) and set(read.references) <= set(read.ids)
    console = Console(file=io.StringIO(), width=200)
    compare.table(runs, console)
    plain = " ".join(console.file.getvalue().split())
    for text in [compare.headline(runs), *compare.cautions(runs)]:
        assert text in read.text and text in plain
    for row in compare.rows(runs):
        assert " ".join(row[1:]) in read.text and all(cell in plain for cell in row[1:])


def test_comparison_of_many_runs_repeats_no_line() -> None:
    runs = [sample(seed=i, rounds=2, title="same") for i in range(10)]
    html = compare.render(runs)
    assert "same (10)" in html
    strokes = re.findall(r'<li><svg viewBox="0 0 26 12" aria-hidden="true"><path d="M1 6H25" ([^>]*)/>', html)
    assert len(strokes) == 20 and len(set(strokes)) == 10


def test_long_runs_are_thinned_in_the_terminal_only() -> None:
    assert (
        len(re.findall(r"^\s+\d+ +[\d.—]+ +[\d.]+ +0\.\d+", shown("many-clients"), re.M))
        == terminal.MOST_ROUNDS
    )
    assert rendered("many-clients").count("<tr>") > 500


def test_words_without_pictures_need_no_matplotlib() -> None:
    code = (
        "import sys, fedtune.report.terminal, fedtune.report.compare, fedtune.report.summary; "
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pages_stay_small() -> None:
    assert len(rendered("usual")) < 200_000
    assert len(rendered("many-clients")) < 600_000
