"""The VADER sentences: the numbers their README gives, and what is kept of them."""

from collections import Counter

import pytest

from fedtune.data import vader
from fedtune.errors import DataError

STEMS = {
    "tweets": 4200,
    "amazonReviewSnippets": 3708,
    "nytEditorialSnippets": 5190,
    "movieReviewSnippets": 10605,
}


def test_all_rated_sentences_are_there(vader_folder):
    counts = {stem: len(list(vader.sentences(vader_folder, stem))) for stem in STEMS}
    assert counts == STEMS
    assert sum(counts.values()) == 23_703


def test_what_is_kept(vader_folder):
    table = vader.read(vader_folder)
    assert table.rows == 9387
    assert Counter(table.columns["domain"]) == {"tweets": 3432, "amazon": 2985, "nyt": 2970}
    assert set(table.columns["label"]) == {"positive", "negative"}
    assert len(set(table.columns["id"])) == table.rows
    assert all(text.strip() for text in table.columns["text"])


def test_documents(vader_folder):
    table = vader.read(vader_folder)
    documents = set(zip(table.columns["domain"], table.columns["document"]))
    per_domain = Counter(domain for domain, _ in documents)
    assert per_domain["tweets"] == 3432  # each its own
    assert per_domain["amazon"] <= 309
    assert per_domain["nyt"] <= 500
    assert all(document.startswith(domain + "-") for domain, document in documents)


def test_entities_are_characters(vader_folder):
    third = list(vader.sentences(vader_folder, "tweets"))[2]
    assert third.id == "3"
    assert third.rating == 2.873684211
    assert third.text.startswith("We were 17 deep last night & the love")


def test_the_sign_and_the_threshold(tmp_path):
    tweets = "1\t0.5\tnice\r\n2\t-0.5\tbad\r\n3\t0.49\tmeh"
    lines = {"tweets": tweets, "amazonReviewSnippets": "7_2\t-3\tawful", "nytEditorialSnippets": "1_1\t0\tso"}
    for stem, text in lines.items():
        (tmp_path / f"{stem}_GroundTruth.txt").write_text(text)
    columns = vader.read(tmp_path).columns
    assert list(zip(*(columns[name] for name in vader.NAMES))) == [
        ("nice", "positive", "tweets", "tweets-1", "tweets-1"),
        ("bad", "negative", "tweets", "tweets-2", "tweets-2"),
        ("awful", "negative", "amazon", "amazon-7", "amazon-7_2"),
    ]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "tweets_GroundTruth.txt").write_text("1\t0.5\tnice\n2\tnot a number\tbad\n")
    with pytest.raises(
        DataError, match=r"tweets_GroundTruth.txt: line 2 is not id, rating and text; run `fedtune fetch"
    ):
        vader.read(tmp_path)
