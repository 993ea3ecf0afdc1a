"""Epsilon against dp-accounting called directly, Opacus, closed forms,
and the table of figures that are known to be right.
"""

import math
import warnings

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.special import erfc
from scipy.stats import norm

from fedtune.errors import RunError
from fedtune.privacy.account import account
from fedtune.privacy.accounting import ACCOUNTANTS, read_epsilon, relation
from fedtune.privacy.releases import Release, Step, histories, history, read, together


def release(z: float, **more) -> Release:
    return Release(
        **{
            "release": "updates",
            "mechanism": "gaussian",
            "unit": "client",
            "parts": {"update": z},
            "clip": 1.0,
        }
        | more
    )


@pytest.mark.parametrize(
    ("population", "cohort", "rounds", "z", "none", "poisson", "fixed"),
    [
        (1000, 50, 100, 1.0, (86.9, 82.0), (2.90, 2.40), 30.35),
        (1000, 50, 100, 2.0, (30.5, 28.2), (0.88, 0.75), 5.08),
        (10000, 100, 200, 1.0, (161, 155), (1.16, 0.78), 10.9),
        (100, 10, 50, 1.0, (45.6, 41.8), (3.16, 2.48), 40.6),
        (100, 10, 50, 2.0, (16.0, 14.3), (0.94, 0.75), 6.2),
    ],
)
def test_figures_that_are_known(population, cohort, rounds, z, none, poisson, fixed):
    """Of a fixed-size cohort one client replaces another, which is twice the clip away:
    z / 2 over the sensitivity.
    """
    delta = population**-1.1
    alone = dict(read_epsilon([release(z, count=rounds)], delta).by)
    drawn = dict(
        read_epsilon([release(z, count=rounds, sampling="poisson", rate=cohort / population)], delta).by
    )
    exact = read_epsilon(
        [release(z, count=rounds, sampling="fixed", sample=cohort, population=population)], delta, ACCOUNTANTS
    )
    assert (alone["rdp"], alone["pld"]) == pytest.approx(none, rel=0.005)
    assert (drawn["rdp"], drawn["pld"]) == pytest.approx(poisson, abs=0.006)
    assert exact.by == (("rdp", pytest.approx(fixed, rel=0.002)),)  # the other two have no reading for it
    rho = rounds / (2 * z**2)
    assert alone["rdp"] <= rho + 2 * math.sqrt(rho * math.log(1 / delta))


@pytest.mark.parametrize("z", [1.0, 2.5])
@pytest.mark.parametrize(("rate", "count"), [(1.0, 3), (0.05, 60), (0.3, 6)])
def test_readings_are_those_of_the_libraries(z, rate, count):
    found = dict(read_epsilon([release(z, count=count, sampling="poisson", rate=rate)], 1e-5, ACCOUNTANTS).by)
    event = SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(z)), count)
    pld, rdp = PLDAccountant(), RdpAccountant()
    assert found["pld"] == pytest.approx(pld.compose(event).get_epsilon(1e-5), rel=2e-3)
    assert found["pld"] >= pld.get_epsilon(1e-5) - 1e-9  # a coarser grid is pessimistic
    assert found["rdp"] == pytest.approx(rdp.compose(event).get_epsilon(1e-5), rel=1e-9)
    warnings.simplefilter("ignore")  # Opacus' grid divides by zero at its end
    for ours, theirs, slack in (("prv", PRVAccountant(), 1e-9), ("rdp", RDPAccountant(), 0.02)):
        theirs.history = [(z, rate, count)]
        assert found[ours] == pytest.approx(theirs.get_epsilon(1e-5), rel=slack)
    assert found["pld"] <= found["prv"] + 0.02 <= found["rdp"] + 0.04


@pytest.mark.parametrize("z", [0.5, 1.0, 4.0])
def test_one_gaussian_is_the_exact_formula(z):
    """Balle and Wang 2018, arXiv:1805.06530, Theorem 8: the smallest delta of one
    Gaussian release at epsilon.
    """
    epsilon = read_epsilon([release(z)], 1e-5).epsilon
    exact = norm.cdf(1 / (2 * z) - epsilon * z) - math.exp(epsilon) * 0.5 * erfc(
        (1 / (2 * z) + epsilon * z) / math.sqrt(2)
    )
    assert exact <= 1e-5 and exact == pytest.approx(1e-5, rel=0.02)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.8, 1.3, 5.0]), st.sampled_from([0.1, 1.0]), st.integers(1, 4)),
        min_size=1,
        max_size=5,
    )
)
@settings(deadline=None)
def test_n_uses_are_n_events_in_any_order(events):
    whole = [release(z, count=n, sampling="poisson", rate=q) for z, q, n in events]
    assert history(whole) == history(
        release(z, sampling="poisson", rate=q) for z, q, n in reversed(events) for _ in range(n)
    )
    plain = [release(z, count=n) for z, _, n in events]
    assert read_epsilon(plain, 1e-4, ["rdp"]).epsilon >= read_epsilon(plain[:-1], 1e-4, ["rdp"]).epsilon


def test_parts_of_one_sample_are_one_longer_vector():
    assert together([3.0, 4.0]) == pytest.approx((1 / 9 + 1 / 16) ** -0.5)
    both = release(1.0, parts={"update": 3.0, "metrics": 4.0}, sampling="poisson", rate=0.1, count=30)
    alone = release(1.0, parts={"update": together([3.0, 4.0])}, sampling="poisson", rate=0.1, count=30)
    assert read_epsilon([both], 1e-5) == read_epsilon([alone], 1e-5)
    apart = [release(z, sampling="poisson", rate=0.1, count=30) for z in (3.0, 4.0)]
    # two samples of their own would hide more than one for both
    assert read_epsilon([both], 1e-5).epsilon > read_epsilon(apart, 1e-5).epsilon


def test_what_is_not_protected_is_infinite():
    good = release(5.0)
    for bad in (
        Release(release="updates", mechanism="none", unit="none", clients=3),
        release(5.0, noise="seeded"),
    ):
        assert read_epsilon([good, bad], 1e-5).epsilon == math.inf
    assert read_epsilon([], 1e-5).epsilon == 0.0
    assert read_epsilon([release(0.01, count=100)], 1e-5).epsilon == math.inf  # more than says anything


def test_relations():
    assert relation([Step(1.0)]) == relation([Step(1.0, "poisson", 0.1)]) == "add-or-remove-one"
    assert relation([Step(1.0), Step(1.0, "fixed", 1.0, 5, 10)]) == "replace-one"
    mixed = [release(4.0), release(4.0, sampling="fixed", sample=5, population=50)]
    # all of it at twice the distance
    assert read_epsilon(mixed, 1e-5).epsilon > read_epsilon([release(2.0)], 1e-5).epsilon


@pytest.mark.parametrize(
    "facts",
    [
        {"release": "updates"},
        {"release": "updates", "mechanism": "gaussian", "unit": "client"},
        {"release": "updates", "mechanism": "laplace", "unit": "client"},
        {"release": "updates", "mechanism": "none", "unit": "none", "surprise": 1},
        {
            "release": "updates",
            "mechanism": "gaussian",
            "unit": "client",
            "clip": 1.0,
            "parts": {"update": 0.0},
        },
        {
            "release": "updates",
            "mechanism": "gaussian",
            "unit": "client",
            "clip": 1.0,
            "parts": {"update": float("nan")},
        },
        {
            "release": "updates",
            "mechanism": "gaussian",
            "unit": "client",
            "clip": 1.0,
            "parts": {"update": 1.0},
            "sampling": "fixed",
        },
        {
            "release": "updates",
            "mechanism": "gaussian",
            "unit": "client",
            "clip": 1.0,
            "parts": {"update": 1.0},
            "rate": 1.5,
        },
    ],
)
def test_an_event_that_cannot_be_read_claims_nothing(facts):
    with pytest.raises(RunError, match="no privacy can be claimed"):
        read(facts)


def test_facts_and_back():
    one = release(1.5, clients=["a", "b"], sampling="poisson", rate=0.25, count=3, noise="seeded")
    assert read(one.facts()) == one and "sample" not in one.facts()


def test_each_client_has_its_own_history():
    events = [release(1.0, clients=["a", "b"]), release(1.0, clients=["a"]), release(2.0)]
    own = histories(events, ["a", "b", "c"])
    assert [sum(n for _, n in own[name]) for name in "abc"] == [3, 2, 1]


def test_an_account(tiny_job):
    from fedtune.privacy.plan import plan_of

    plan = plan_of(
        tiny_job(
            "privacy.unit=client",
            "privacy.noise-multiplier=3.0",
            "privacy.clip=1.0",
            "federation.weighting=equal",
            "privacy.epsilon=9.0",
        ),
        50,
    )
    events = [(1, plan.release(["a", "b"])), (2, plan.release(["a"])), (3, plan.release(["a", "c"]))]
    found = account(events, ["a", "b", "c", "d"], plan)
    assert found.client == "a" and found.epsilon == read_epsilon([release(3.0, count=3)], plan.delta).epsilon
    assert [n for _, n in found.spread] == [1, 2, 1] and found.spread[-1][0] == 0.0
    assert found.rounds[-1] == (3, found.epsilon) and found.left == pytest.approx(9.0 - found.epsilon)
    assert (
        account(
            [*events, (4, Release(release="updates", mechanism="none", unit="none", clients=2))], ["a"], plan
        ).epsilon
        == math.inf
    )
