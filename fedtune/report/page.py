"""One run as one self-contained page: no scripts, no network, light, dark and print."""

import re
from collections.abc import Sequence

from fedtune.report import facts, html, plots, plots_clients, privacy, privacy_page, tables
from fedtune.report.facts import Fact
from fedtune.report.format import ABSENT, clean, count, number, percent, plural, size
from fedtune.report.summary import Summary

GLOSSARY = {
    "base": "the pretrained model; it stays frozen, and every client has the same copy",
    "adapter": "the small part that is trained",
    "frame and core": (
        "fed-sb splits an adapter into two frozen matrices, the frame, and a small trained "
        "one between them, the core"
    ),
    "head": "the last layer, which turns features into labels",
    "client": "whoever holds data that stays in place: a device or a site",
    "round": (
        "chosen clients train from the current model; the weighted mean of what they return is the next one"
    ),
    "update": "what a client returns in a round: trained numbers and a few sums, never data",
    "held-out": "examples kept from training on each client and used for measuring only",
    "worst tenth": "mean accuracy of the tenth of clients that are served worst",
    "base + head": (
        "the frozen base with a head trained on all clients' data in one place, "
        "which federated training avoids"
    ),
    "alone": "clients that train the same adapter on their own data only",
    "natural value": "the value that divides the data, such as its source",
    "epsilon": (
        "how much a model may reveal about its training data; smaller is more private, infinite is no promise"
    ),
    "label agreement": "share of held-out examples on which an exported file gives the trained model's label",
    "KB, MB": "1000 and 1,000,000 bytes; bytes are those of serialised messages",
}
FOLDED = 20
"""The most labels whose table is not folded up."""
PERSONAL_GLOSSARY = {
    "personal accuracy": (
        "that of what each client predicts with on its own, a model, a head or entries that it keeps, "
        "on its own held-out examples"
    )
}
UNITS_GLOSSARY = {
    "unit": (
        "what is trained or left alone as one: a block of the base, or all that is trained outside "
        "the blocks, such as the head"
    ),
    "score": "how much a block mattered to the clients at the last probe, as a share of all blocks' together",
}
FLEET_GLOSSARY = {
    "simulated time": (
        "what the rounds would have taken on the job's classes of devices: bytes over bandwidth, "
        "examples over speed, and waiting for the lost until the deadline"
    )
}


def render(summary: Summary) -> str:
    """The page of a run. The same summary gives the same text."""
    s = summary
    body = [
        _learning(s),
        _baselines(s),
        _personal(s),
        _clients(s),
        _labels(s),
        _communication(s),
        _devices(s),
        _units(s),
        _ranks(s),
        _refused(s),
        _exports(s),
        privacy_page.section(s["privacy"]),
        _made(s),
        html.section("glossary", "Words", html.glossary(_words(s))),
    ]
    version = s["versions"].get("fedtune", "")
    footer = f"<p>Written by fedtune {html.text(version)} from the run of {html.text(s['created'])}.</p>"
    eyebrow = f"fedtune run report · {s['task']} · {clean(s['created'])[:10]}"
    return html.document(
        clean(s["title"]) or "fedtune run",
        eyebrow,
        _lead(s),
        "\n".join(part for part in body if part),
        footer,
    )


def _words(s: Summary) -> dict[str, str]:
    return (
        GLOSSARY
        | (PERSONAL_GLOSSARY if s.get("personal") else {})
        | (UNITS_GLOSSARY if s.get("units") else {})
        | (FLEET_GLOSSARY if s.get("devices") else {})
        | (privacy.GLOSSARY if "delta" in s["privacy"] else {})
    )


def _lead(s: Summary) -> str:
    headline, figure = html.text(facts.headline(s)), number(facts.accuracy(s))
    if headline.startswith(figure):
        headline = f"<b>{figure}</b>{headline[len(figure) :]}"
    # a figure and its unit stay on one line
    headline = re.sub(r"(\d) ([KMGT]B|bytes?)\b", "\\1\u00a0\\2", headline)
    return "\n".join(
        part
        for part in (
            f'<p class="headline">{headline}</p>',
            html.paragraph(facts.verdict(s), "verdict"),
            html.bullets(facts.notices(s), "notices"),
            html.tiles(facts.key_figures(s)),
        )
        if part
    )


def _evaluated(s: Summary) -> str:
    """The examples that the curves are measured on, said where the last point stands on more
    of them than the others.
    """
    counts = [r["evaluated"] for r in s["rounds"] if r["evaluated"]]
    if len(set(counts)) < 2:
        return "held-out data"
    return (
        f"held-out data ({count(min(counts))} examples drawn by the seed, in the last round "
        f"all {count(max(counts))})"
    )


def _learning(s: Summary) -> str:
    drawn = plots.learning(s)
    if not drawn:
        return html.section(
            "learning", "Learning", html.paragraph("No round has been measured yet."), _rounds(s)
        )
    return html.section(
        "learning",
        "Learning",
        html.paragraph(
            f"Measured on {_evaluated(s)} after each evaluated round; round 0 is the model before training."
        ),
        html.grid(*(html.figure(plot) for plot in drawn)),
        _rounds(s),
    )


def _rounds(s: Summary) -> str:
    return html.details(
        "Every round as a table", html.table("Rounds", tables.round_header(s), tables.round_rows(s), ())
    )


def _baselines(s: Summary) -> str:
    rows = tables.rival_rows(s)
    if not rows:
        return html.section("baselines", "Against baselines", html.paragraph("No baseline was measured."))
    local = s.get("baselines", {}).get("local", {}).get("clients", [])
    alone = [(c["name"], number(c["accuracy"]), number(c["federated"]), count(c["examples"])) for c in local]
    return html.section(
        "baselines",
        "Against baselines",
        html.paragraph(
            "Accuracy on the same held-out examples. Difference: federated minus baseline; "
            "for “alone”, on the same clients."
        ),
        html.table("Baselines", tables.RIVAL_HEADER, rows),
        html.details(
            "Each client that trained alone",
            html.table("Clients alone", ("client", "alone", "federated", "held-out examples"), alone),
        ),
    )


def _personal(s: Summary) -> str:
    return html.section("personal", "What clients keep", html.paragraph(facts.personal(s)))


def _clients(s: Summary) -> str:
    rows = [(name, number(ours), number(head), count(n)) for name, ours, head, n in facts.scores(s)]
    return html.section(
        "clients",
        "The clients",
        html.paragraph(facts.spread(s)),
        html.paragraph(facts.listed(s)),
        html.grid(html.figure(plots_clients.distribution(s)), html.figure(plots_clients.split(s))),
        html.details(
            "Each client's accuracy as a table",
            html.table("Clients", ("client", "federated", "base + head", "held-out examples"), rows),
        ),
        html.details("The split as a table", _split(s)),
    )


def _labels(s: Summary) -> str:
    """Many are folded up: the ends are what matters, and the terminal shows them."""
    rows = tables.label_rows(s)
    made = html.table("Labels", tables.label_header(s), rows)
    return html.section(
        "labels",
        "The labels",
        html.paragraph(facts.labels(s)),
        html.details("Each label as a table", made) if len(rows) > FOLDED else made,
    )


def _split(s: Summary) -> str:
    labels = s["labels"] if all(len(c["labels"]) == len(s["labels"]) for c in s["split"]) else []
    rows = [
        (
            c["name"],
            c["natural"] or ABSENT,
            count(c["train"]),
            count(c["held_out"]),
            *map(count, c["labels"][: len(labels)]),
        )
        for c in s["split"]
    ]
    return _population(s) + html.table(
        "Split", ("client", "natural value", "training", "held-out", *labels), rows, (0, 1)
    )


def _population(s: Summary) -> str:
    """Sizes of all clients, where the split lists only some of them."""
    if "population" not in s:
        return ""
    p = s["population"]
    names = {0.0: "least", 0.5: "median", 1.0: "most"}
    rows = [
        ("training", *map(count, p["train_quantiles"])),
        ("held-out", *map(count, p["held_out_quantiles"])),
    ]
    header = (
        f"examples of each of {plural(p['clients'], 'client')}",
        *(names.get(q, percent(q, 1)) for q in p["quantiles"]),
    )
    return html.table("Sizes of all clients", header, rows)


def _communication(s: Summary) -> str:
    rows = [
        (c["name"], size(c["up"]), size(c["down"]), count(c["rounds"])) for c in s["communication"]["clients"]
    ]
    taken = s["communication"].get("took_part", 0)
    return html.section(
        "communication",
        "Communication",
        html.paragraph("Counted from serialised messages, the frame included."),
        html.table(
            "Communication",
            ("what", "bytes"),
            [(Fact(f.name, "", f.note), f.value) for f in facts.communication(s)],
        ),
        html.details(
            f"{count(len(rows))} of {plural(taken, 'client')} that took part" if taken else "Every client",
            html.table("Bytes of each client", ("client", "sent", "received", "rounds"), rows),
        ),
    )


def _with_table(
    name: str,
    title: str,
    text: str,
    label: str,
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    words: Sequence[int] = (0,),
) -> str:
    """A section of a sentence and a table; empty without either."""
    return html.section(name, title, html.paragraph(text), html.table(label, header, rows, words))


def _devices(s: Summary) -> str:
    return _with_table(
        "devices",
        "Devices",
        facts.fleet(s),
        "Classes of devices",
        tables.DEVICE_HEADER,
        tables.device_rows(s),
    )


def _units(s: Summary) -> str:
    return _with_table(
        "units", "Trained units", facts.units(s), "Trained units", tables.unit_header(s), tables.unit_rows(s)
    )


def _ranks(s: Summary) -> str:
    return _with_table(
        "ranks", "Ranks", facts.ranks(s), "Ranks of clients", tables.RANK_HEADER, tables.rank_rows(s)
    )


def _refused(s: Summary) -> str:
    rows = facts.refusals(s)
    if not rows:
        return html.section(
            "refused", "Refused updates", html.paragraph("None: every update that came was taken.")
        )
    text = f"{plural(len(rows), 'update')} not taken. Each round went on with the others."
    return _with_table(
        "refused", "Refused updates", text, "Refused updates", ("round", "client", "reason"), rows, (0, 1, 2)
    )


def _exports(s: Summary) -> str:
    rows = tables.exports(s)
    if not rows:
        return html.section("exports", "Exported files", html.paragraph("Nothing was exported."))
    return _with_table(
        "exports",
        "Exported files",
        "Each file was run on held-out data and compared with the trained model.",
        "Exported files",
        tables.EXPORT_HEADER,
        rows,
        (0, 1),
    )


def _made(s: Summary) -> str:
    settings = "".join(
        html.card(html.definitions(Fact(k, v) for k, v in values.items()), title=name)
        for name, values in tables.settings(s).items()
        if values
    )
    versions = html.definitions(Fact(clean(name), clean(v)) for name, v in s["versions"].items())
    return html.section(
        "made",
        "How it was made",
        html.card(html.definitions(facts.model(s))),
        html.details(
            "All settings of the job", f'<div class="settings">{settings}</div>' if settings else ""
        ),
        html.details("Versions", html.card(versions) if s["versions"] else ""),
    )
