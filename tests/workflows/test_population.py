"""Many clients: nothing that a run writes or keeps has an entry for each,
and all figures are still those of all.
"""

import csv
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from fedtune.common.metrics import tenth, value, worst_tenth
from fedtune.common.storage import write_json
from fedtune.data.clients import ClientStore, Stream, memory
from fedtune.errors import RunError
from fedtune.report import facts
from fedtune.report.summary import LISTED, check, few
from fedtune.training.evaluate import ClientScores, by_client, features, score
from fedtune.workflows.baselines import listed
from fedtune.workflows.finish import finish
from fedtune.workflows.setup import open_setup, require_unchanged

CLIENTS, ROWS = 1500, 4


@pytest.fixture(scope="module")
def crowd(tiny_csv, tmp_path_factory):
    """Four rows for each of 1500 users."""
    with tiny_csv.open(encoding="utf-8") as file:
        texts = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    path = tmp_path_factory.mktemp("crowd") / "crowd.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["text", "label", "user"])
        out.writerows([*texts[(row * 7) % len(texts)], f"u{row % CLIENTS}"] for row in range(CLIENTS * ROWS))
    return path


@pytest.fixture(scope="module")
def simulation(crowd, tiny_job, run_rounds, tmp_path_factory):
    job = tiny_job(
        f"data.source={crowd}",
        "data.by=user",
        "data.clients=0",
        "federation.cohort=20",
        "federation.rounds=2",
        "evaluation.max-examples=64",
        'evaluation.baselines=["head"]',
        "report.html=true",
    )
    made = run_rounds(job, tmp_path_factory.mktemp("run") / "run")
    finish(made)
    return made


@pytest.fixture(scope="module")
def summary(simulation):
    return check(json.loads(simulation.run.summary.read_text()))


def test_lists_are_short_and_figures_are_of_all(simulation, summary):
    split, scores = simulation.setup.split, simulation.scores(simulation.run.newest().state.arrays)
    own = [
        scores.metrics(slice(start, end))
        for start, end in zip(split.held_out.offsets, split.held_out.offsets[1:])
    ]
    accuracies = [value(metrics, "accuracy") for metrics in own]
    assert len(accuracies) == CLIENTS
    assert LISTED - 5 <= len(summary["final"]["clients"]) <= LISTED and len(summary["split"]) == LISTED
    assert summary["final"]["mean"] == pytest.approx(np.mean(accuracies)) and summary["final"][
        "worst_tenth"
    ] == worst_tenth(accuracies)
    assert summary["final"]["whole"] == {
        "clients": CLIENTS,
        "examples": CLIENTS,
        "worst_examples": tenth(CLIENTS),
    }
    by_name = dict(zip(split.clients, own))
    assert all(
        c["accuracy"] == value(by_name[c["name"]], "accuracy")
        and c["loss"] == value(by_name[c["name"]], "loss")
        for c in summary["final"]["clients"]
    )
    # evenly chosen
    assert np.mean([c["accuracy"] for c in summary["final"]["clients"]]) == pytest.approx(
        summary["final"]["mean"], abs=0.01
    )
    assert summary["population"]["clients"] == facts.clients(summary) == CLIENTS
    assert (summary["population"]["train"], summary["population"]["held_out"]) == (
        CLIENTS * (ROWS - 1),
        CLIENTS,
    )
    assert set(summary["population"]["train_quantiles"]) == {ROWS - 1} and sum(
        summary["population"]["labels"]
    ) == CLIENTS * (ROWS - 1)


def test_the_head_is_compared_on_all_clients(summary):
    head = summary["baselines"]["head"]
    assert head["whole"]["clients"] == CLIENTS and head["whole"]["better"] + head["whole"]["equal"] <= CLIENTS
    assert [c["name"] for c in head["clients"]] == [c["name"] for c in summary["final"]["clients"]]
    assert f"of {CLIENTS:,} clients" in facts.spread(summary) and facts.against(summary) == head["whole"]


def test_only_those_asked_are_known_and_the_page_stays_small(simulation, summary):
    asked = {name for line in simulation.run.metrics() for name in line["clients"]}
    assert (
        {c["name"] for c in summary["communication"]["clients"]}
        == asked
        == simulation.run.newest().counters["rounds"].keys()
    )
    page = simulation.run.page.read_text()
    assert (
        page.count("<tr>") < 2.2 * LISTED
        and f"of {CLIENTS:,} clients" in page
        and facts.listed(summary) in page
    )
    assert (
        simulation.run.metrics()[0]["evaluated"] == 64
        and simulation.run.metrics()[-1]["evaluated"] == CLIENTS
    )


def test_few_takes_both_ends_and_nothing_twice():
    assert few(5, 10) == [0, 1, 2, 3, 4] and few(0) == []
    for count in (11, 19, 20, 1000):
        places = few(count, 10)
        assert (
            len(set(places)) == 10 and (places[0], places[-1]) == (0, count - 1) and places == sorted(places)
        )


def test_those_listed_include_the_worst_and_leave_out_who_has_no_accuracy():
    rng = np.random.default_rng(0)
    accuracy = rng.permutation(np.concatenate([rng.random(3 * LISTED), np.full(50, np.nan)]))
    places = listed(
        ClientScores(np.arange(len(accuracy)), accuracy, accuracy, np.ones(len(accuracy), np.int64))
    )
    order = np.argsort(accuracy)
    assert (
        set(order[:5]) <= set(places)
        and order[3 * LISTED - 1] in places
        and np.isfinite(accuracy[places]).all()
    )
    assert LISTED - 5 <= len(places) <= LISTED and np.all(np.diff(places) > 0)


@pytest.mark.parametrize("keep", [0, 3000, 10**9])
def test_a_stream_is_scored_as_the_whole(keep, simulation):
    """To the last bit, whatever is kept, the first time and the second."""
    setup = simulation.setup
    rows = setup.split.held_out.rows[:200]
    stream = setup.store.stream(rows, keep)
    whole = setup.store.stream(rows).take(np.arange(len(rows)))
    expected = score(simulation.model, whole, setup.encoder, 16)
    for _ in range(2):
        found = score(simulation.model, stream, setup.encoder, 16)
        assert all(
            np.array_equal(getattr(found, f.name), getattr(expected, f.name))
            for f in dataclasses.fields(found)
        )
    assert list(stream.lengths) == list(whole.lengths) and np.array_equal(stream.labels, whole.labels)
    assert np.array_equal(
        features(simulation.model, stream, setup.encoder, 16),
        features(simulation.model, whole, setup.encoder, 16),
    )
    assert sum(memory(example) for example in stream._kept.values()) == stream._bytes <= keep
    assert (len(stream._kept) == 0) == (keep == 0) and (len(stream._kept) == len(rows)) == (keep == 10**9)


def test_nothing_held_out_is_scored_as_nothing(simulation):
    setup = simulation.setup
    nothing = score(simulation.model, setup.store.stream(np.zeros(0, np.int64)), setup.encoder, 16)
    assert (
        len(nothing.loss) == 0 and len(by_client(nothing, type(setup.split.held_out).of([np.zeros(0)]))) == 0
    )


def test_the_store_keeps_those_asked_for_last(simulation):
    setup = simulation.setup
    first, second, third = (setup.split.clients[place] for place in range(3))
    one = sum(memory(example) for example in setup.store.train(first).encoded)
    store = ClientStore(setup.dataset, setup.split, setup.encoder, limit=int(2.5 * one))
    kept = store.train(first)
    store.train(second)
    assert store.train(first) is kept  # and so the second is the oldest
    store.train(third)
    assert store.train(first) is kept and second not in store._kept and store._bytes <= store.limit
    assert store._bytes == sum(memory(e) for data, _ in store._kept.values() for e in data.encoded)
    nothing = ClientStore(setup.dataset, setup.split, setup.encoder, limit=one // 2)
    assert nothing.train(first) is not nothing.train(first) and nothing._bytes == 0


def test_encoding_what_is_kept_is_not_done_again(simulation):
    setup, calls = simulation.setup, []
    counting = SimpleNamespace(
        encode=lambda texts: calls.append(len(texts)) or setup.encoder.encode(texts),
        lengths=setup.encoder.lengths,
    )
    stream = Stream(setup.dataset.examples, np.arange(10), counting, keep=10**9)
    stream.take(np.array([3, 1]))
    stream.take(np.array([1, 3, 5]))
    assert calls == [2, 1]


def test_clients_are_looked_up_by_place_and_made_when_asked_for(simulation):
    split, clients = simulation.setup.split, simulation.setup.store.clients
    assert (
        len(clients) == CLIENTS and clients[7].name == split.clients[7] and clients[-1].examples == ROWS - 1
    )
    assert [c.name for c in clients[:2]] == list(split.clients[:2]) and split.clients.place(
        clients[7].name
    ) == 7


def test_a_changed_text_is_another_data_set(simulation, crowd, tmp_path):
    """Nobody holds more or less than before, and yet it is not the data that the run began with."""
    require_unchanged(simulation.setup, simulation.run)
    lines = crowd.read_text(encoding="utf-8").splitlines()
    text, rest = lines[1].split(",", 1)
    changed = tmp_path / "changed.csv"
    changed.write_text("\n".join([lines[0], f"{text} more,{rest}", *lines[2:]]) + "\n", encoding="utf-8")
    job = simulation.setup.job
    other = open_setup(job.model_copy(update={"data": job.data.model_copy(update={"source": str(changed)})}))
    with pytest.raises(RunError, match=r"changed\.csv no longer holds what it held when the run began"):
        require_unchanged(other, simulation.run)


def test_a_run_of_before_the_digest_is_judged_by_its_list(tiny_job, run_rounds, tmp_path):
    simulation = run_rounds(tiny_job("federation.rounds=1"), tmp_path / "run")
    path = simulation.run.path / "run.json"
    old = {key: found for key, found in json.loads(path.read_text()).items() if key != "split_sha256"}
    assert len(old["split"]) == 6 and "population" not in old
    write_json(path, old)
    require_unchanged(simulation.setup, simulation.run)
    old["split"][0]["train"] += 1
    write_json(path, old)
    with pytest.raises(RunError, match="no longer holds"):
        require_unchanged(simulation.setup, simulation.run)


def test_a_run_that_trains_other_tensors_is_not_gone_on_with(tiny_job, run_rounds, tmp_path):
    """As one is that an older version began, where this one trains less of the base."""
    simulation = run_rounds(tiny_job("federation.rounds=1"), tmp_path / "run")
    with pytest.raises(
        RunError,
        match=(
            r"which trained other tensors of this base than this one .* makes of its job; "
            r"continue it with that version or begin a new run"
        ),
    ):
        require_unchanged(
            open_setup(tiny_job("federation.rounds=1", "units.strategy=top", "units.budget=1")),
            simulation.run,
        )
