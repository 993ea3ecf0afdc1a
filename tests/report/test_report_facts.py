"""Formats, sentences, and reading summary.json."""

import copy
import doctest
import json
from pathlib import Path

import pytest
from report_samples import CASES, crowd, diverged, refused, rendered, sample, unfinished

from fedtune.errors import ContractError, RunError
from fedtune.report import compare, facts, format, privacy, summary


def test_doctests() -> None:
    assert doctest.testmod(format).failed == 0
    assert doctest.testmod(format).attempted >= 9


def test_sizes_never_show_a_thousand_of_a_unit() -> None:
    assert [format.size(n) for n in (0, 1, 999, 1000, 999_499, 999_500, 999_999_999)] == [
        "0 bytes", "1 byte", "999 bytes", "1 KB", "999 KB", "1 MB", "1 GB",
    ]  # fmt: skip


def test_clean_takes_out_what_a_terminal_would_obey() -> None:
    assert format.clean("a\x1b[31m\x07\u202e\ud800\nb") == "a\ufffd[31m\ufffd\ufffd\ufffd\ufffdb"


@pytest.mark.parametrize("case", CASES)
def test_every_sample_is_a_summary(case: str, tmp_path: Path) -> None:
    made = CASES[case]()
    (tmp_path / "summary.json").write_text(json.dumps(made), encoding="utf-8")
    loaded = summary.load_summary(tmp_path)
    assert json.dumps(loaded, sort_keys=True) == json.dumps(made, sort_keys=True)
    assert json.dumps(summary.load_summary(tmp_path / "summary.json")) == json.dumps(loaded)


def test_unknown_keys_of_later_versions_are_left_out() -> None:
    assert "later" not in summary.check({**sample(), "later": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[]", "the file: input should be a valid dictionary"),
        ("{}", "title: field required"),
        (
            json.dumps({**sample(), "rounds": [{"round": "x"}]}),
            "rounds.0.round: input should be a valid integer",
        ),
    ],
)
def test_broken_files_are_one_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RunError) as caught:
        summary.load_summary(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert message in str(caught.value)


def test_missing_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist; the run has not come that far"):
        summary.load_summary(tmp_path)
    with pytest.raises(RunError, match=r"does not exist; give a run folder"):
        summary.load_summary(tmp_path / "no.json")


def test_headline() -> None:
    made = sample()
    made["final"]["accuracy"], made["communication"]["update_bytes"] = 0.8612, 46_040
    assert (
        facts.headline(made) == "0.861 accuracy on held-out data after 10 rounds; 46 KB per client and round."
    )
    last = f"{unfinished()['rounds'][2]['accuracy']:.3f}"
    assert facts.headline(unfinished()).startswith(
        f"{last} accuracy on held-out data after 3 of 10 rounds, unfinished;"
    )
    assert facts.headline(CASES["not-begun"]()).startswith(
        "Nothing evaluated yet after 0 of 10 rounds, unfinished;"
    )
    assert "next-token accuracy" in facts.headline(CASES["causal"]())
    assert "after 1 round;" in facts.headline(CASES["one-round"]())


def test_notices_say_what_went_wrong() -> None:
    assert facts.notices(sample()) == []
    assert facts.notices(refused()) == ["3 updates refused; the rounds went on without them."]
    assert facts.notices(unfinished()) == ["This run is unfinished: 3 of 10 rounds done."]
    broken = facts.notices(diverged())
    assert "not a number from round 4 on" in broken[0]
    assert any("Not better than “base + head”" in line for line in broken)


def test_training_metrics_that_were_not_sent_are_no_divergence() -> None:
    """Under privacy they may stay with the clients; a loss that was measured and is no number stays one."""
    made = {**sample(), "privacy": {"unit": "example", "epsilon": 3.2, "note": ""}}
    silent = {**made, "rounds": [{**r, "train_loss": None} for r in made["rounds"]]}
    assert facts.notices(silent) == []
    assert (
        "not a number"
        in facts.notices(
            {**made, "rounds": [{**r, "train_loss": None if r["round"] > 3 else 1.0} for r in made["rounds"]]}
        )[0]
    )
    assert (
        "not a number"
        in facts.notices({**silent, "rounds": [{**r, "loss": None} for r in silent["rounds"]]})[0]
    )


def test_a_live_private_run_says_why_it_has_no_accuracy() -> None:
    made = {
        **sample(),
        "engine": "live",
        "baselines": {},
        "privacy": {"unit": "example", "epsilon": 3.2, "note": ""},
    }
    made["rounds"] = [
        {**r, "train_loss": None, "loss": None, "accuracy": None, "evaluated": 0} for r in made["rounds"]
    ]
    made["final"] = {"accuracy": None, "loss": None, "mean": None, "worst_tenth": None, "clients": []}
    assert facts.notices(made) == [privacy.UNSCORED]
    assert (
        facts.headline(made).startswith("Not evaluated after 10 rounds;")
        and facts.key_figures(made)[0].note == "not measured"
    )
    summed = {
        **made,
        "privacy": {"unit": "none", "epsilon": "inf", "note": ""},
        "job": {**made["job"], "privacy": {"secure-aggregation": True}},
    }
    assert privacy.UNSCORED in facts.notices(summed)


def test_privacy_is_plain() -> None:
    assert facts.privacy(sample()).startswith("No differential privacy: epsilon is infinite.")
    assert (
        facts.privacy({**sample(), "privacy": {"unit": "client", "epsilon": 3.2, "note": ""}})
        == "Epsilon is 3.2, protecting each client."
    )


def test_comparison_words() -> None:
    ours, theirs = sample(), copy.deepcopy(sample())
    theirs["title"], theirs["job"]["federation"]["lr"] = "other", 0.1
    theirs["final"]["accuracy"], theirs["communication"]["up"] = 0.9, theirs["communication"]["up"] + 10**6
    assert compare.differences([ours, theirs]) == [("federation.lr", "0.005", "0.1")]
    assert compare.cautions([ours, theirs]) == []
    assert (
        compare.headline([ours, theirs])
        == "“other” is the most accurate: 0.900; “fed-sb on MiniLM, four kinds of text” sent least: 49.3 MB."
    )
    assert compare.names([ours, ours]) == [ours["title"], f"{ours['title']} (2)"]
    assert any("held-out data" in line for line in compare.cautions([ours, sample(seed=1)]))
    assert any("tasks or labels" in line for line in compare.cautions([ours, CASES["causal"]()]))
    assert compare.cautions([unfinished()]) == ["No run is finished."]
    with pytest.raises(ContractError, match="at least one run"):
        compare.headline([])


def test_of_a_crowd_the_sentences_are_about_all() -> None:
    s = crowd()
    assert facts.spread(s).endswith(
        "over 55,000 clients; mean 0.812, worst tenth 0.125 (5,500 clients with 5,501 held-out "
        "examples in all). Better than base + head on 30,000 of 55,000 clients, equal on 20,000; "
        "the worst tenth of base + head is 0.062."
    )
    assert facts.listed(s).startswith(
        "Listed and drawn: 40 of 55,000 clients by their accuracy"
    ) and "40 of 100,000 clients" in facts.listed(s)
    figures = {f.name: f for f in facts.key_figures(s)}
    assert figures["clients"].value == "100,000" and figures["held-out accuracy"].note == "on 60,000 examples"
    assert any(f.note == "frozen, sent once to each of 12,345 clients" for f in facts.communication(s))
    assert any(r.note == "4,321 of 100,000 clients, own data only" for r in facts.rivals(s))
    assert facts.listed(sample()) == ""


def test_the_page_of_a_crowd_says_what_it_leaves_out() -> None:
    page = rendered("crowd")
    for words in (
        "300,000 examples over 100,000 clients, from 1 to 77 to train on",
        "Drawn: 40 of the clients, evenly spaced",
        "40 of 55,000 clients, evenly from worst to best",
        "40 of 12,345 clients that took part",
        "median",
    ):
        assert words in page, words


def test_crowds_with_other_data_are_said_to_differ() -> None:
    one, other = crowd(), crowd()
    assert not any("held-out data" in line for line in compare.cautions([one, crowd()]))
    other["population"]["sha256"] = "0" * 64
    assert any("different held-out data or clients" in line for line in compare.cautions([one, other]))
