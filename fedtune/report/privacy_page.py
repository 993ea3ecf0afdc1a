"""The privacy of a run as a section of its page, and as a page of its own."""

from fedtune.report import html, plots_privacy, privacy
from fedtune.report.facts import Fact
from fedtune.report.privacy import Privacy


def section(p: Privacy) -> str:
    """Sentence, accountants, plots, costs and assumptions; of a run without privacy, the sentence."""
    return html.section(
        "privacy", "Privacy", html.card(html.paragraph(privacy.sentence(p)), kind="privacy"), _figures(p)
    )


def render(p: Privacy, title: str, created: str, version: str) -> str:
    """The page of its own. The same values give the same text."""
    lead = (
        f'<p class="headline">{html.text(privacy.claim(p))}</p>'
        + html.paragraph(p["note"], "verdict")
        + html.tiles(Fact(*tile) for tile in privacy.tiles(p))
    )
    words = {
        "epsilon": (
            "how much a model may reveal about its training data; "
            "smaller is more private, infinite is no promise"
        )
    } | privacy.GLOSSARY
    body = (
        html.section("privacy", "What was spent", _figures(p)),
        html.section("glossary", "Words", html.glossary(words)),
    )
    footer = (
        f"<p>Written by fedtune {html.text(version)} from the ledger of the run of {html.text(created)}.</p>"
    )
    return html.document(
        title or "fedtune run",
        f"fedtune privacy report · {created[:10]}",
        lead,
        "\n".join(part for part in body if part),
        footer,
    )


def _figures(p: Privacy) -> str:
    parts = (
        html.table("Accountants", privacy.ACCOUNTANT_HEADER, privacy.accountant_rows(p), (0, 2)),
        html.paragraph(privacy.spread(p), "after"),
        html.grid(html.figure(plots_privacy.spending(p)), html.figure(plots_privacy.distribution(p))),
        html.details(
            "Every value as a table",
            html.table("By round", privacy.ROUND_HEADER, privacy.round_rows(p), ()),
            html.table("By clients", privacy.SPREAD_HEADER, privacy.spread_rows(p), ()),
        ),
        html.heading(
            "What each kind of release cost", html.table("Costs", privacy.PART_HEADER, privacy.part_rows(p))
        ),
        html.heading(privacy.assumed(p), html.bullets(p.get("assumptions", []), "assumptions")),
    )
    return "\n".join(part for part in parts if part)
