"""A device's part in secure sums without its processes: a round once, questions in order, company enough;
and the coordinator's loop around them.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from fedtune.algorithms.units import selected, tensors_of
from fedtune.client.policy import Policy
from fedtune.client.secure import SecureWork, is_question
from fedtune.errors import Refused, SecAggFailed
from fedtune.job import UnitsSection, parse_job
from fedtune.privacy.account import assumptions
from fedtune.privacy.plan import plan_of
from fedtune.round.replies import Reply
from fedtune.round.traffic import Traffic
from fedtune.secagg import messages
from fedtune.secagg.terms import session_of
from fedtune.server.secure import SecureRounds
from fedtune.types import TensorSpec
from fedtune.wire import Schema, encode

SCHEMA = Schema((TensorSpec("a", (3, 2), "low"), TensorSpec("b", (4,), "high")))
FRAME, NAMES = "0" * 16, ("a", "b", "c", "d")
JOB = parse_job(
    "",
    (
        "privacy.secure-aggregation=true",
        "privacy.clip=2.0",
        "federation.weighting=equal",
        "federation.cohort=4",
        "privacy.noise=seeded",
    ),
)
BUNDLE = SimpleNamespace(
    job=JOB,
    digest="ab" * 32,
    frame_digest=FRAME,
    schema=SCHEMA,
    manifest=SimpleNamespace(spec=SimpleNamespace(schema=SCHEMA)),
)
MODEL = {"a": np.ones((3, 2), np.float32), "b": np.zeros(4, np.float32)}


def question(round=1, kind="model"):
    return encode(kind, SCHEMA, MODEL, round=round, frame=FRAME)


def update(place, round=1):
    return encode(
        "update",
        SCHEMA,
        {n: a + np.float32(0.1 * place) for n, a in MODEL.items()},
        round=round,
        frame=FRAME,
        weight=5.0,
        metrics={"loss": (1.0, 2.0), "accuracy": (1.0, 2.0)},
    )


def device(folder, name, minimum=3):
    return SecureWork(folder / name, BUNDLE, minimum)


class Coordinator:
    """What `SecureRounds` needs of one."""

    def __init__(self):
        self.traffic, self.state, self.seen = Traffic(), SimpleNamespace(round=0), []

    def on_reply(self, reply):
        self.seen.append(reply.client)

    def finish_secure(self, sum_up):
        self.refused = {}
        return sum_up(self.refused)


def rounds(devices, silent=()):
    """SecureRounds over devices in this process. silent: (client, kind of message) that is not answered."""
    secure = next(iter(devices.values())).secure

    def ask(pairs, round):
        yield Reply("late", b"x", late=True)
        for place, (name, packet) in enumerate(pairs):
            try:
                if not is_question(packet):
                    devices[name].begin(packet)
                    answer = devices[name].first(packet, update(place + 1), name)
                elif (name, messages.kind_of(packet).name) in silent:
                    continue
                else:
                    answer = devices[name].answer(packet)
                yield Reply(name, answer)
            except Refused as e:
                yield Reply(name, None, str(e))

    return SecureRounds(secure, session_of(BUNDLE.digest), ask, ask, lambda: set(NAMES))


def test_a_round_gives_the_sum(tmp_path):
    devices, coordinator = {n: device(tmp_path, n) for n in NAMES}, Coordinator()
    through = rounds(devices, silent={("b", "INBOX"), ("c", "SURVIVORS")})
    with pytest.raises(SecAggFailed, match=r"2 .* opened their shares, 3 are needed"):
        through(coordinator, [(n, question()) for n in NAMES])
    assert coordinator.refused == {}

    coordinator = Coordinator()
    found = rounds({n: device(tmp_path / "again", n) for n in NAMES}, silent={("b", "INBOX")})(
        coordinator, [(n, question()) for n in NAMES]
    )
    assert found.clients == ("a", "c", "d") and coordinator.seen == ["late", *NAMES]
    change, metrics = through.secure.change(found.vector, 3)
    np.testing.assert_allclose(change["a"], np.full((3, 2), (0.1 + 0.3 + 0.4) / 3), atol=1e-4)
    assert metrics["loss"] == (pytest.approx(1.5, abs=1e-3), 3.0)
    assert (
        coordinator.traffic.late == 4
        and coordinator.traffic.up["a"] == coordinator.traffic.up["c"] > coordinator.traffic.up["b"] > 0
    )


def test_too_few_devices_are_not_asked(tmp_path):
    coordinator = Coordinator()
    with pytest.raises(SecAggFailed, match="2 devices could be asked, 3 are needed"):
        rounds({n: device(tmp_path, n) for n in NAMES})(coordinator, [(n, question()) for n in NAMES[:2]])
    assert not coordinator.seen


def test_a_round_is_begun_once_whoever_asks(tmp_path):
    one = device(tmp_path, "a")
    one.begin(question(3))
    for again in (one, device(tmp_path, "a")):  # also after a restart
        for round in (3, 2):
            with pytest.raises(Refused, match="has begun round 3 already, and begins none twice"):
                again.begin(question(round))
    one.begin(question(4))
    with pytest.raises(Refused, match="only trained models are summed"):
        one.begin(encode("gradient-request", Schema(()), {}, round=5))
    one.file.write_text("many")
    with pytest.raises(Refused, match="cannot read which round"):
        one.begin(question(9))


def test_units_that_are_not_those_of_the_job_are_not_trained_into_a_sum(tmp_path):
    """What a coordinator had this device alone train, it would see in the sum."""
    schema = Schema(tuple(TensorSpec(f"{i}.w", (2, 2), f"block.{i}") for i in range(3)))
    job = JOB.model_copy(update={"units": UnitsSection(strategy="lisa", budget=1)})
    model = {t.name: np.ones(t.shape, np.float32) for t in schema.tensors}
    for round in range(1, 4):
        (right,) = tensors_of(schema, selected(job, schema, round))
        for place, names in enumerate([None, *([t.name] for t in schema.tensors), ["0.w", "1.w"]]):
            work = SecureWork(
                tmp_path / f"{round}-{place}",
                SimpleNamespace(**vars(BUNDLE) | {"job": job, "schema": schema}),
                3,
            )
            asked = encode("model", schema, model, round=round, frame=FRAME, train=names)
            answer = encode(
                "update", schema, {n: model[n] for n in names or model}, round=round, frame=FRAME, weight=1.0
            )
            work.begin(asked)
            if names == [right]:
                assert is_question(work.first(asked, answer, "a"))
                continue
            with pytest.raises(
                Refused,
                match=(
                    rf"secure-aggregation: round {round}: the coordinator asks for other units than "
                    r"the job; nothing was sent"
                ),
            ):
                work.first(asked, answer, "a")


def test_a_device_with_a_budget_of_its_own_is_asked_for_that(tmp_path):
    """Of a class of the job, where noise protects what it alone may train."""
    schema = Schema(tuple(TensorSpec(f"{i}.w", (2, 2), f"block.{i}") for i in range(3)))
    job = JOB.model_copy(update={"units": UnitsSection(strategy="top", budget=1)})
    model = {t.name: np.ones(t.shape, np.float32) for t in schema.tensors}
    for place, (names, taken) in enumerate([(["2.w"], False), (["1.w", "2.w"], True), (None, False)]):
        work = SecureWork(
            tmp_path / str(place), SimpleNamespace(**vars(BUNDLE) | {"job": job, "schema": schema}), 3, 2
        )
        asked = encode("model", schema, model, round=1, frame=FRAME, train=names)
        work.begin(asked)
        answer = encode(
            "update", schema, {n: model[n] for n in names or model}, round=1, frame=FRAME, weight=1.0
        )
        if taken:
            assert is_question(work.first(asked, answer, "a"))
        else:
            with pytest.raises(Refused, match="asks for other units than the job"):
                work.first(asked, answer, "a")


def test_questions_out_of_order_end_the_round(tmp_path):
    one, terms = device(tmp_path, "a"), device(tmp_path, "a").secure.terms(session_of(BUNDLE.digest), 1)
    with pytest.raises(Refused, match="no round is open"):
        one.answer(messages.ask_keys(terms))
    one.begin(question())
    first = one.first(question(), update(1), "a")
    assert is_question(first) and not is_question(question()) and len(first) == 92
    with pytest.raises(Refused, match="no question that is open"):
        one.answer(messages.ask_keys(terms))
    with pytest.raises(Refused, match="not the question that comes next"):
        one.answer(messages.inbox(terms, {}))
    with pytest.raises(Refused):
        one.answer(messages.inbox(terms, {}))


def test_a_device_wants_company():
    manifest = SimpleNamespace(
        sha256="", task=JOB.model.task, spec=SimpleNamespace(method=JOB.adapter.method)
    )
    Policy().check(manifest, JOB)
    with pytest.raises(
        Refused, match="min-cohort: sums of 3 clients would open, this device is only part of those of 4"
    ):
        Policy.model_validate({"min-cohort": 4}).check(manifest, JOB)
    three = JOB.model_copy(update={"federation": JOB.federation.model_copy(update={"cohort": 3})})
    with pytest.raises(Refused, match="sums of 2 clients"):
        Policy().check(manifest, three)
    Policy.model_validate({"min-cohort": 2}).check(manifest, three)
    many = JOB.model_copy(update={"federation": JOB.federation.model_copy(update={"cohort": 10**6})})
    with pytest.raises(Refused, match=r"federation\.cohort = 1000000: secure aggregation of a cohort"):
        Policy().check(manifest, many)


def test_the_assumptions_say_whom_it_trusts():
    client = (
        "privacy.unit=client",
        "privacy.noise-multiplier=2.0",
        "privacy.delta=1e-5",
        "privacy.clip=1.0",
        "federation.weighting=equal",
        "federation.cohort=20",
        "data.clients=200",
    )
    said = assumptions(
        plan_of(parse_job("", [*client, "privacy.secure-aggregation=true", "privacy.i-understand=true"]), 200)
    )
    assert any("14 honest clients in each sum" in line and "does not count" in line for line in said)
    assert not any("sees each client's update" in line for line in said)
    assert sum(line.startswith("Sampling:") for line in said) == 1
    plain = assumptions(plan_of(parse_job("", [*client, "privacy.i-understand=true"]), 200))
    assert (
        any("sees each client's update" in line for line in plain)
        and sum(line.startswith("Sampling:") for line in plain) == 1
    )
