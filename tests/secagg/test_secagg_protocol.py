"""A round gives the plain sum bit for bit, whoever drops out when; or nothing at all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_rounds import Cohort, terms

from fedtune.errors import SecAggFailed
from fedtune.secagg.graph import Design
from fedtune.secagg.masks import sum_plainly
from fedtune.secagg.server import ServerRound, run_round
from fedtune.secagg.terms import STAGES


def agrees(cohort, found, inside):
    assert found.clients == tuple(inside)
    np.testing.assert_array_equal(
        found.vector, sum_plainly([cohort.vectors[n] for n in inside], cohort.terms)
    )
    assert found.vector.dtype == cohort.terms.dtype


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_everyone_is_everyones_neighbour(data):
    count = data.draw(st.integers(2, 8))
    threshold = data.draw(st.integers(count // 2 + 1, count))
    # 4 and more: stays, so that most do
    until = data.draw(st.lists(st.integers(0, 8), min_size=count, max_size=count))
    facts = terms(
        data.draw(st.integers(1, 9)),
        data.draw(st.sampled_from([32, 64])),
        data.draw(st.integers(0, 2**32 - 1)),
    )
    cohort = Cohort(count, Design(count - 1, threshold), terms=facts, seed=data.draw(st.integers(0, 99)))
    drops = {name: STAGES[stage] for name, stage in zip(cohort.names, until) if stage < 4}
    if sum(stage > 3 for stage in until) >= threshold:
        agrees(
            cohort,
            run_round(cohort.server, cohort.ask(drops)),
            [n for n, stage in zip(cohort.names, until) if stage > 2],
        )
    else:
        with pytest.raises(SecAggFailed, match=f"{threshold} are needed"):
            run_round(cohort.server, cohort.ask(drops))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_few_are_ones_neighbours(data):
    count = data.draw(st.integers(7, 14))
    threshold = data.draw(st.integers(3, 5))
    until = data.draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
    cohort = Cohort(count, Design(4, threshold), terms=terms(3, 64))
    drops = {name: STAGES[stage] for name, stage in zip(cohort.names, until) if stage < 4}
    late = sum(1 <= stage < 4 for stage in until)  # who is gone before the graph is drawn leaves no gap in it
    try:
        found = run_round(cohort.server, cohort.ask(drops))
    except SecAggFailed:
        assert late > 5 - threshold or count - len(drops) < threshold
    else:
        agrees(cohort, found, [n for n, stage in zip(cohort.names, until) if stage > 2])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("degree", [8, 6])
def test_drop_outs_at_each_stage_up_to_the_threshold_and_not_beyond(stage, degree):
    for gone, count in ((2, 9), (9 - 4, 9)):
        cohort = Cohort(count, Design(degree, 5))
        drops = dict.fromkeys(cohort.names[1 : 1 + gone], stage)
        if gone == 2:
            agrees(
                cohort,
                run_round(cohort.server, cohort.ask(drops)),
                [n for n in cohort.names if n not in drops or stage == "unmask"],
            )
        else:
            did = dict(
                zip(STAGES, ("sent keys", "shared their seeds", "sent a vector", "opened their shares"))
            )[stage]
            with pytest.raises(
                SecAggFailed,
                match=rf"^4 clients {did}, 5 are needed: the round is void and nothing is released",
            ):
                run_round(cohort.server, cohort.ask(drops))
            for after in (cohort.server.ask, cohort.server.finish):
                with pytest.raises(SecAggFailed, match="over"):
                    after()


def test_one_fewer_than_the_threshold_at_the_last_question_fails_and_one_more_does_not():
    for answering, ok in ((6, True), (5, False)):
        cohort = Cohort(9, Design(8, 6))
        drops = {"device-0": "masked"} | dict.fromkeys(cohort.names[1 : 9 - answering], "unmask")
        if ok:
            agrees(cohort, run_round(cohort.server, cohort.ask(drops)), cohort.names[1:])
        else:
            with pytest.raises(SecAggFailed, match="5 clients opened their shares, 6 are needed"):
                run_round(cohort.server, cohort.ask(drops))


@pytest.mark.parametrize("stage, did", [("masked", "sent a vector"), ("unmask", "opened their shares")])
def test_a_gap_in_a_sparse_graph_fails_where_the_whole_cohort_would_do(stage, did):
    cohort = Cohort(12, Design(4, 4))
    questions = cohort.until(stage)
    circle = cohort.server._stage.circle
    gone = {circle.names[i] for i in circle.neighbours[0][:2]}
    for name in questions.keys() - gone:
        cohort.server.take(name, cohort.answer(stage, name, questions[name]))
    with pytest.raises(
        SecAggFailed, match=rf"^around client 'device-\d+' 3 of the holders of its shares {did}, 4 are needed"
    ):
        cohort.server.ask() if stage == "masked" else cohort.server.finish()


def test_the_server_asks_in_order_and_ends():
    cohort = Cohort(3)
    with pytest.raises(SecAggFailed, match="not at its last stage"):
        cohort.server.finish()
    cohort = Cohort(3)
    cohort.until("unmask")
    with pytest.raises(SecAggFailed, match="over"):
        cohort.server.ask()


@pytest.mark.parametrize(
    "names, design", [(["a", "a", "b"], Design(2, 2)), (["a"], Design(2, 2)), ([], Design(1, 2))]
)
def test_a_server_needs_different_names_and_enough(names, design):
    with pytest.raises(ValueError, match="must differ"):
        ServerRound(terms(), names, design)


@pytest.mark.parametrize(
    "change",
    [
        {"session": bytes(15)},
        {"round": -1},
        {"round": 2**32},
        {"length": 0},
        {"length": 2**26 + 1},
        {"bits": 16},
    ],
)
def test_terms_out_of_bounds_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        terms(**change)


def test_labels_of_secrets_never_meet():
    one, other = terms(), terms(round=4)
    made = [
        t.label(p, *i, keys=k)
        for t in (one, other, terms(bits=64), terms(session=bytes(16)), terms(length=6))
        for p, i, k in (
            ("own mask", (1,), ()),
            ("own check", (1,), ()),
            ("own mask", (2,), ()),
            ("pair mask", (1, 2), (b"a", b"b")),
            ("share", (1, 2), (b"a", b"b")),
            ("share", (2, 1), (b"b", b"a")),
        )
    ]
    assert len(set(made)) == len(made)


def test_the_plain_sum_takes_vectors_of_the_round_only():
    with pytest.raises(ValueError, match="must be"):
        sum_plainly([np.zeros(5, np.uint64)], terms())
    with pytest.raises(ValueError, match="must be"):
        sum_plainly([np.zeros(4, np.uint32)], terms())
    assert sum_plainly([], terms()).tolist() == [0] * 5
    assert sum_plainly([np.full(5, 2**32 - 1, np.uint32)] * 3, terms()).tolist() == [2**32 - 3] * 5
