"""The coordinator's round: who is refused and why, what survives, what is recorded when, what is counted."""

from collections import Counter

import numpy as np
import pytest

from fedtune.algorithms import fed_avg
from fedtune.errors import RunError
from fedtune.job import parse_job
from fedtune.round.coordinator import start
from fedtune.round.replies import Reply
from fedtune.round.traffic import Traffic
from fedtune.runs.folder import create_run
from fedtune.runs.ledger import Ledger
from fedtune.types import ClientInfo, TensorSpec
from fedtune.wire import Schema, decode, encode

SCHEMA = Schema((TensorSpec("a.R", (3, 3), "block.0"), TensorSpec("head.bias", (2,), "head")))
FRAME, OTHER_FRAME = "0123456789abcdef", "f" * 16
FRAME_BYTES = 1000
CLIENTS = tuple(ClientInfo(f"c{i}", 10 * (i + 1)) for i in range(4))


def model(value=0.0):
    return {t.name: np.full(t.shape, value, np.float32) for t in SCHEMA.tensors}


def update(value=1.0, *, round=1, frame=FRAME, weight=10.0, schema=SCHEMA, arrays=None, metrics=None):
    return encode(
        "update", schema, arrays or model(value), round=round, frame=frame, weight=weight, metrics=metrics
    )


@pytest.fixture
def make(tmp_path):
    """make("section.key=value", ...) -> a coordinator at round 0 whose cohort is all four clients."""

    def coordinator(*changes, **options):
        job = parse_job("", ["data.clients=4", "federation.cohort=4", "federation.rounds=5", *changes])
        run = create_run(tmp_path / "run", job, {}) if not (tmp_path / "run").exists() else options.pop("run")
        algorithm = fed_avg(
            seed=0, cohort=job.federation.cohort, units=SCHEMA.units, sampling=job.federation.sampling
        )
        evaluate = options.pop("evaluate", lambda round, arrays: None)
        made = start(job, run, SCHEMA, FRAME, FRAME_BYTES, algorithm, CLIENTS, model, evaluate, **options)
        made.begin()
        return made

    return coordinator


NAN = model() | {"head.bias": np.array([0, np.nan], np.float32)}
HUGE = model() | {"a.R": np.full((3, 3), 1e30, np.float32)}
BAD = {
    "another frame": (
        Reply("c0", update(frame=OTHER_FRAME)),
        "frame: ffffffffffffffff, this run has 0123456789abcdef",
    ),
    "no frame": (Reply("c0", update(frame="")), "frame: none, this run has 0123456789abcdef"),
    "an old round": (Reply("c0", update(round=7)), "round: reply to round 7, this is round 1"),
    "another schema": (
        Reply("c0", update(schema=Schema(SCHEMA.tensors[:1]), arrays={"a.R": model()["a.R"]})),
        "schema: ",
    ),
    "a model sent back": (
        Reply("c0", encode("model", SCHEMA, model(), round=1, frame=FRAME)),
        "kind: 'model', taken here: update",
    ),
    "NaN": (Reply("c0", update(arrays=NAN)), "not-finite: "),
    "too far from the model": (
        Reply("c0", update(9.0)),
        "norm: 29.85 from the model, federation.max-norm is 20",
    ),
    "numbers whose squares overflow float32": (
        Reply("c0", update(arrays=HUGE)),
        "norm: 3e+30 from the model",
    ),
    "too many examples": (
        Reply("c0", update(weight=101)),
        "weight: 101 examples claimed, federation.max-weight is 100",
    ),
    "only some tensors": (
        Reply("c0", update(arrays={"a.R": model()["a.R"]})),
        "tensors: 1 of 2 tensors; all were assigned",
    ),
    "not a packet": (Reply("c0", b"hello, this is a client"), "magic: "),
    "nothing": (Reply("c0", b""), "size: 0 bytes"),
    "a failure": (Reply("c0", None, "MemoryError: 3 GB"), "failed: MemoryError: 3 GB"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_refused_by_name_and_the_round_goes_on(case, make):
    reply, reason = BAD[case]
    coordinator = make("federation.max-norm=20.0", "federation.max-weight=100.0")
    coordinator.plan()
    report = coordinator.finish([Reply("c1", update(1.0)), reply, Reply("c2", update(3.0))])
    assert report.clients == ("c1", "c2") and report.refused.keys() == {"c0", "c3"}
    assert report.refused["c0"].startswith(reason) and report.refused["c3"] == "no reply"
    assert coordinator.run.metrics()[-1]["refused"] == report.refused
    np.testing.assert_array_equal(coordinator.state.arrays["a.R"], model(2.0)["a.R"])


def test_a_second_reply_does_not_count_and_the_first_stands(make):
    coordinator = make()
    coordinator.plan()
    report = coordinator.finish(
        [
            Reply("c0", update(1.0)),
            Reply("c0", update(9.0)),
            *(Reply(c, update(1.0)) for c in ("c1", "c2", "c3")),
        ]
    )
    assert report.clients == ("c0", "c1", "c2", "c3") and report.refused["c0"].startswith("duplicate: ")
    assert coordinator.state.arrays["a.R"].max() == 1.0


def test_a_good_reply_after_a_bad_one_counts(make):
    coordinator = make()
    coordinator.plan()
    report = coordinator.finish([Reply("c0", update(frame=OTHER_FRAME)), Reply("c0", update(1.0))])
    assert report.clients == ("c0",) and report.refused["c0"].startswith("frame: ")


@pytest.mark.parametrize("stranger", ["mallory", "c1"])
def test_who_was_not_asked_is_not_heard(stranger, make):
    """A name nobody knows, and a client that sits this round out:
    neither counts in the mean nor in the bytes.
    """
    coordinator = make("federation.cohort=2")
    asked = [client for client, _ in coordinator.plan()]
    assert stranger not in asked
    report = coordinator.finish([Reply(stranger, update(9.0)), *(Reply(c, update(1.0)) for c in asked)])
    assert report.clients == tuple(asked) and report.refused == {stranger: "client: was not asked this round"}
    assert stranger not in coordinator.traffic.up and coordinator.state.arrays["a.R"].max() == 1.0


def test_too_few_replies_leave_the_model(make):
    coordinator = make("federation.min-replies=3")
    coordinator.plan()
    report = coordinator.finish([Reply("c0", update()), Reply("c1", update()), Reply("c2", None, "gone")])
    assert coordinator.state.round == 1 and coordinator.state.arrays["a.R"].max() == 0.0
    assert report.clients == () and report.metrics == {} and report.weight == 0
    assert report.refused == {
        "c0": "round void: too few replies",
        "c1": "round void: too few replies",
        "c2": "failed: gone",
        "c3": "no reply",
    }
    coordinator.plan()
    assert coordinator.finish([Reply(c.name, update(1.0, round=2)) for c in CLIENTS]).clients == (
        "c0",
        "c1",
        "c2",
        "c3",
    )


@pytest.mark.parametrize(
    "replies", [[], [Reply(c.name, update(weight=0.0)) for c in CLIENTS]], ids=["none", "of no weight"]
)
def test_nothing_to_average_is_a_void_round(replies, make):
    coordinator = make()
    coordinator.plan()
    report = coordinator.finish(replies)
    assert report.clients == () and report.refused.keys() == {"c0", "c1", "c2", "c3"}
    assert coordinator.state.round == 1 and coordinator.state.arrays["a.R"].max() == 0.0


def test_replies_are_read_one_at_a_time(make):
    """While a reply is made, the one before it has been averaged already: the coordinator keeps no list."""
    coordinator = make()
    taken = []

    def replies():
        for client in CLIENTS:
            assert len(taken) == len(coordinator.traffic.up)
            taken.append(client.name)
            yield Reply(client.name, update())

    coordinator.plan()
    coordinator.finish(replies())
    assert len(taken) == 4


def test_the_ledger_knows_a_round_before_it_is_sent(make):
    coordinator = make()
    packets = coordinator.plan()
    (event,) = Ledger(coordinator.run.ledger).events()
    assert len(packets) == 4 and event.round == 1
    assert event.facts == {"release": "updates", "mechanism": "none", "unit": "none", "clients": 4}


def test_nothing_is_made_to_be_sent_when_the_ledger_cannot_be_written(make):
    coordinator = make()
    coordinator.run.ledger.write_bytes(b"no ledger at all" * 100)
    with pytest.raises(RunError, match="not a ledger"):
        coordinator.plan()
    assert coordinator.traffic.down == {}


def test_planning_again_records_nothing_more(make):
    coordinator = make()
    one, two = coordinator.plan(), coordinator.plan()
    assert one == two and len(Ledger(coordinator.run.ledger).events()) == 1


def test_bytes_counted_are_bytes_sent(make):
    coordinator = make("federation.cohort=2")
    up, down, rounds = Counter(), Counter(), Counter()
    for number in range(1, 6):
        replies = []
        for client, packet in coordinator.plan():
            header = decode(packet, SCHEMA, kinds=["model"], round=number, frame=FRAME).header
            assert header.tensors is None  # all of them
            down[client] += len(packet) + (FRAME_BYTES if not rounds[client] else 0)
            rounds[client] += 1
            reply = (
                update(1.0, round=number, metrics={"loss": (1 / 3, number)})
                if client != "c1"
                else b"garbage is paid for as well"
            )
            up[client] += len(reply)
            replies.append(Reply(client, reply))
        coordinator.finish(replies)
    traffic = coordinator.traffic
    assert (traffic.up, traffic.down, traffic.rounds) == (dict(up), dict(down), dict(rounds))
    assert sum(rounds.values()) == 10 and max(rounds.values()) > 1
    assert (
        coordinator.run.metrics()[-1]["total_bytes"] == traffic.total == sum(up.values()) + sum(down.values())
    )


def test_bytes_before_round_1_are_counted_too(make):
    spent = Traffic(up={"c0": 70}, down={"c0": 5})
    assert make(traffic=spent).run.metrics()[0]["total_bytes"] == 75


def test_begin_evaluates_the_start_once(make):
    rounds = []
    coordinator = make(
        evaluate=lambda round, arrays: rounds.append(round) or {"loss": (3.0, 2.0), "accuracy": (1.0, 2.0)}
    )
    coordinator.begin()
    assert rounds == [0]
    (line,) = coordinator.run.metrics()
    assert (line["loss"], line["accuracy"], line["evaluated"], line["train_loss"]) == (1.5, 0.5, 2, None)


def test_a_started_run_goes_on_where_it_stopped(make):
    one = make()
    one.plan()
    one.finish([Reply(c.name, update(2.0, metrics={"loss": (4.0, 2.0)})) for c in CLIENTS])
    two = make(run=one.run)
    assert two.state.round == 1 and two.state.arrays["a.R"].max() == 2.0 and two.traffic == one.traffic
    assert two.run.metrics()[-1]["train_loss"] == 2.0 and not two.done
