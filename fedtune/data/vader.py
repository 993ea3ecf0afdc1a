"""The VADER sentences (Hutto & Gilbert, ICWSM 2014) as a table: the text default,
three domains from one rating study.

Twenty people rated each sentence from -4 to 4. A sentence counts as positive or negative where the mean is at
least 0.5 away from 0; the others are dropped.

The fourth file, movieReview, is left out: its sentences are those of the Rotten Tomatoes set that
SST-2 was made from, and about four fifths of SST-2 stand in it, so that a model trained on it
could not be tested on SST-2.
"""

import html
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedtune.data.tables import Table, read_utf8
from fedtune.errors import DataError

DOMAINS = {"tweets": "tweets", "amazon": "amazonReviewSnippets", "nyt": "nytEditorialSnippets"}
"""Domain name -> stem of its file."""

THRESHOLD = 0.5

NAMES = ("text", "label", "domain", "document", "id")


class Sentence(NamedTuple):
    id: str
    rating: float
    text: str


def read(folder: Path) -> Table:
    """All kept sentences, with columns text, label ("positive", "negative"), domain, document and id.

    A document is a product review or an editorial; each tweet is a document of its own. Sentences of one
    document share a topic and a writer, so they belong on one side of a split.

    Raises:
        DataError: a line that is not id, rating, text.
    """
    every = ((domain, sentence) for domain, stem in DOMAINS.items() for sentence in sentences(folder, stem))
    rows = [_row(domain, sentence) for domain, sentence in every if abs(sentence.rating) >= THRESHOLD]
    columns = {name: list(values) for name, values in zip(NAMES, zip(*rows))}
    return Table(NAMES, columns, len(rows), "package:vader-icwsm-2014")


def sentences(folder: Path, stem: str) -> Iterator[Sentence]:
    """Every rated sentence of one file, in order, with HTML entities such as &amp; turned into characters."""
    path = folder / f"{stem}_GroundTruth.txt"
    for number, line in enumerate(read_utf8(path).replace("\r", "").split("\n"), 1):
        if not line:
            continue
        try:
            name, rating, text = line.split("\t")
            yield Sentence(name, float(rating), html.unescape(text).strip())
        except ValueError:
            raise DataError(
                f"{path}: line {number} is not id, rating and text; "
                "run `fedtune fetch vader-icwsm-2014` again"
            ) from None


def _row(domain: str, sentence: Sentence) -> tuple[str, str, str, str, str]:
    document = sentence.id.split("_")[0]  # "12_3" is sentence 3 of document 12; a tweet is "12"
    label = "positive" if sentence.rating > 0 else "negative"
    return sentence.text, label, domain, f"{domain}-{document}", f"{domain}-{sentence.id}"
