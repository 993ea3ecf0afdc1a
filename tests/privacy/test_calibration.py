"""Noise from epsilon never gives too little, nor much more than is needed;
plans refuse what would claim too much.
"""

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import JobError, PrivacyRefused
from fedtune.job import parse_job
from fedtune.privacy.calibration import calibrate
from fedtune.privacy.plan import default_delta, outward, plan_of, resolved, warnings_of
from fedtune.privacy.releases import Step

EXAMPLE = ("privacy.unit=example", "privacy.clip=1.0", "privacy.examples=200", "federation.weighting=equal")
CLIENT = (
    "privacy.unit=client",
    "privacy.clip=1.0",
    "federation.weighting=equal",
    "data.clients=500",
    "federation.cohort=25",
)


@pytest.mark.slow
@given(st.floats(0.3, 8.0), st.floats(0.005, 0.5), st.integers(1, 100), st.sampled_from([1e-6, 1e-4, 1e-2]))
@settings(max_examples=5, deadline=None)
def test_never_overspends(epsilon, rate, count, delta):
    z = calibrate(lambda z: ((Step(z, "poisson", rate), count),), epsilon, delta)
    exact = [
        PLDAccountant(value_discretization_interval=1e-3)
        .compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(x)), count))
        .get_epsilon(delta)
        for x in (z, z * 0.99)
    ]
    assert exact[0] <= epsilon < exact[1] or z <= 0.051


def test_a_fixed_cohort_is_calibrated_by_rdp():
    plan = plan_of(parse_job("", [*CLIENT, "privacy.epsilon=6.0", "privacy.amplification=true"]), 500)
    assert plan.reading().best == "rdp" and 5.9 < plan.reading().epsilon <= 6.0
    assert plan.whole() == ((Step(plan.parts["update"], "fixed", 1.0, 25, 500), 10),)


def test_what_else_leaves_is_paid_for():
    """The bits of the clip and the metrics come out of the same epsilon."""
    alone, more = (
        plan_of(parse_job("", [*CLIENT, "privacy.epsilon=6.0", *extra]), 500)
        for extra in ((), ("privacy.adaptive-clip=true", "privacy.metrics-noise=8.0"))
    )
    assert set(more.parts) == {"update", "clip-bits", "metrics"} and more.reading().epsilon <= 6.0
    assert more.parts["update"] > alone.parts["update"]
    with pytest.raises(PrivacyRefused, match=r"^privacy.epsilon = 6: no noise reaches it"):
        plan_of(parse_job("", [*CLIENT, "privacy.epsilon=6.0", "privacy.metrics-noise=0.5"]), 500)


def test_fewer_participations_need_less_noise():
    all_, few = (
        plan_of(parse_job("", [*EXAMPLE, "privacy.epsilon=3.0", *extra]), 24)
        for extra in ((), ("privacy.participations=3",))
    )
    assert few.parts["update"] < all_.parts["update"] and few.budget == 3 and all_.budget == 0


def test_resolved_jobs_say_everything():
    job = resolved(parse_job("", [*EXAMPLE, "privacy.epsilon=3.0"]), 24)
    assert job.privacy.noise_multiplier > 0 and 0 < job.privacy.delta < 1 / 200
    assert plan_of(job, 24).reading().epsilon <= 3.0 and resolved(job, 24) == job
    assert resolved(parse_job(""), 24) == parse_job("")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            (*EXAMPLE, "privacy.epsilon=3.0", "privacy.delta=0.005"),
            r"^privacy.delta = 0.005: with 200 examples it must be below 0.005",
        ),
        (
            (*CLIENT, "privacy.epsilon=3.0", "privacy.delta=0.1"),
            r"^privacy.delta = 0.1: with 500 clients it must be below 0.002",
        ),
        (
            (*EXAMPLE, "privacy.epsilon=20.0", "privacy.noise-multiplier=0.6"),
            r"^privacy.epsilon: this run's is 1[0-9].*, above 10",
        ),
        ((*EXAMPLE, "privacy.noise-multiplier=0.4"), r"^privacy.epsilon: this run's is .*, above 10"),
        (
            (*EXAMPLE, "privacy.noise-multiplier=1.0", "privacy.epsilon=0.5"),
            r"^privacy.noise-multiplier = 1: gives epsilon = .*, the job promises 0.5",
        ),
    ],
)
def test_claims_that_would_not_hold_are_refused(changes, said):
    with pytest.raises(PrivacyRefused, match=said):
        plan_of(parse_job("", changes), 500)


def test_danger_can_be_meant():
    assert (
        plan_of(parse_job("", [*EXAMPLE, "privacy.noise-multiplier=0.6", "privacy.i-understand=true"]), 500)
        .reading()
        .epsilon
        > 10
    )


def test_warnings():
    few = plan_of(parse_job("", [*CLIENT[:3], "privacy.noise-multiplier=4.0"]), 24)
    seeded = plan_of(
        parse_job(
            "", [*EXAMPLE, "privacy.noise-multiplier=4.0", "privacy.noise=seeded", "federation.batch-size=64"]
        ),
        500,
    )
    assert "24 clients" in next(warnings_of(few))
    assert [w.split(":")[0] for w in warnings_of(seeded)] == [
        'privacy.noise = "seeded"',
        "privacy.examples = 200",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("privacy.epsilon=3.0",), 'privacy.unit = "none" protects nothing'),
        (("privacy.unit=example",), "privacy.clip = 0"),
        (("privacy.unit=example",), "privacy.examples = 0"),
        (("privacy.unit=client",), "privacy.epsilon = 0"),
        (("privacy.unit=client",), "federation.weighting"),
        ((*EXAMPLE, "privacy.adaptive-clip=true"), 'only for unit = "client"'),
        ((*EXAMPLE, "privacy.examples=10"), "at least federation.batch-size"),
        ((*EXAMPLE, "adapter.init=gradient"), "no noise protects"),
        ((*CLIENT, "privacy.examples=10"), 'only for unit = "example"'),
        ((*CLIENT, "federation.min-replies=3"), "would tell who took part"),
        ((*CLIENT, "privacy.amplification=true", "privacy.participations=2"), "remove one of the two"),
    ],
)
def test_jobs_that_do_not_hold_together(changes, said):
    with pytest.raises(JobError) as e:
        parse_job("", changes)
    assert said in str(e.value)


def test_what_a_client_says_of_itself():
    plain = {"loss": (30.0, 10.0), "accuracy": (7.0, 10.0)}
    assert outward(parse_job(""), 12, plain) == (12.0, plain)
    private = parse_job("", [*CLIENT, "privacy.epsilon=3.0"])
    assert outward(private, 12, plain) == (1.0, {})
    counted = private.model_copy(
        update={"privacy": private.privacy.model_copy(update={"metrics_noise": 1.0})}
    )
    assert outward(counted, 12, {"loss": (3000.0, 10.0), "accuracy": (7.0, 10.0)}) == (
        1.0,
        {"loss": (10.0, 1.0), "accuracy": (0.7, 1.0)},
    )


@pytest.mark.parametrize("count", [2, 7, 24, 200, 1000, 10**6])
def test_default_delta(count):
    assert 0.5 * count**-1.1 < default_delta(count) <= count**-1.1 < 1 / count
