"""The discrete Gaussian, conditional rounding and the shares of distributed noise, against closed forms
and dp-accounting itself.
"""

import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, SelfComposedDpEvent
from dp_accounting.pld.privacy_loss_distribution import from_discrete_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fedtune.errors import PrivacyRefused
from fedtune.job import parse_job
from fedtune.privacy import distributed as module
from fedtune.privacy.accounting import read_epsilon
from fedtune.privacy.discrete import discrete_gaussian, round_within, rounded_norm, shortfall
from fedtune.privacy.distributed import STEPS, TAIL, distributed, excess
from fedtune.privacy.noise import SeededNoise, SystemNoise
from fedtune.privacy.plan import fewest, plan_of
from fedtune.privacy.releases import Release, history

BASE = (
    "privacy.unit=client",
    "privacy.clip=0.5",
    "federation.weighting=equal",
    "federation.cohort=20",
    "federation.rounds=30",
    "data.clients=1000",
    "privacy.delta=1e-5",
)


def seeded(seed=0):
    return SeededNoise(np.random.default_rng(seed))


@pytest.mark.parametrize("sigma", [0.5, 0.8, 2.3, 7.0])
def test_the_discrete_gaussian_has_its_probabilities(sigma):
    drawn = discrete_gaussian(sigma, 200_000, seeded(3).uniform)
    reach = math.ceil(3 * sigma)
    x = np.arange(-40 * reach, 40 * reach + 1)
    mass = np.exp(-(x**2) / (2 * sigma**2))
    mass /= mass.sum()
    inside = np.abs(x) <= reach
    seen = np.array([(drawn == k).sum() for k in x[inside]] + [(np.abs(drawn) > reach).sum()])
    assert chisquare(seen, np.append(mass[inside], mass[~inside].sum()) * drawn.size).pvalue > 1e-4


@pytest.mark.parametrize("sigma", [40.0, 3e4, 2e9])
def test_wide_noise_has_its_moments(sigma):
    drawn = discrete_gaussian(sigma, 100_000, SystemNoise().uniform).astype(np.float64) / sigma
    assert abs(drawn.mean()) < 6 / math.sqrt(drawn.size)
    assert abs(drawn.var() - 1) < 6 * math.sqrt(2 / drawn.size)
    assert abs((drawn**4).mean() - 3) < 6 * math.sqrt(96 / drawn.size)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 400), bound=st.floats(0.1, 300), seed=st.integers(0, 2**32), sparse=st.floats(0, 1)
)
def test_a_rounded_vector_never_passes_its_bound(size, bound, seed, sparse):
    rng = np.random.default_rng(seed)
    exact = rng.standard_normal(size) * (rng.random(size) >= sparse)
    exact *= bound / max(float(np.linalg.norm(exact)), 1e-12) * (1 - 1e-9)
    found = round_within(exact, rounded_norm(bound, size), seeded(seed).uniform)
    assert np.abs(found - exact).max() < 1
    assert np.linalg.norm(found) <= rounded_norm(bound, size) <= bound + math.sqrt(size) + 1e-9


def test_the_bound_is_the_papers():
    # Values of TensorFlow Federated's own test: bound 1, granularity 1e-2, 1e9 numbers; and 1e-9.
    assert rounded_norm(1 / 1e-2, 10**9) * 1e-2 == pytest.approx(
        math.sqrt(1 + 1e-4 * 1e9 / 4 + 1e-2 * (1 + 1e-2 * math.sqrt(1e9) / 2))
    )
    assert rounded_norm(1e9, 10**9) * 1e-9 == pytest.approx(1.0, abs=1e-4)
    assert rounded_norm(100.0, 1) == pytest.approx(math.sqrt(100**2 + 0.25 + 100.5))
    assert rounded_norm(1.0, 1) == pytest.approx(math.sqrt(2.75))
    assert rounded_norm(0.1, 1) == pytest.approx(math.sqrt(0.01 + 0.25 + 0.6))


def test_a_vector_that_is_too_long_is_not_sent():
    with pytest.raises(PrivacyRefused, match="does not round to at most 3; nothing was sent"):
        round_within(np.full(10, 2.0), 3.0, seeded().uniform)


@pytest.mark.parametrize("cohort, least", [(8, 6), (20, 14), (100, 22)])
def test_the_fewest_survivors_have_the_promised_noise(cohort, least):
    z, clip, size = 0.8, 0.5, 30_000
    grid, share = distributed(clip, z, size, cohort, least)
    total = sum(share.shares(np.zeros(size), seeded(i)) for i in range(least))
    longest = share.norm / grid.scale
    assert clip <= longest <= 1.001 * clip
    measured = total.astype(np.float64).std() / grid.scale
    assert measured == pytest.approx(z * longest, rel=6 / math.sqrt(2 * size))
    assert grid.noise * grid.scale >= TAIL * share.sigma
    assert grid.clip * grid.scale >= STEPS


def test_noise_that_is_too_small_does_not_leave(monkeypatch):
    _, share = distributed(0.5, 1.0, 5_000, 10, 7)
    monkeypatch.setattr(
        module,
        "discrete_gaussian",
        lambda sigma, size, uniform: discrete_gaussian(0.8 * sigma, size, uniform),
    )
    with pytest.raises(PrivacyRefused, match="were promised; nothing was sent"):
        share.shares(np.zeros(5_000), seeded())


def test_what_no_modulus_holds_is_refused():
    with pytest.raises(ValueError, match="no 65536 steps from 0 to clip"):
        distributed(1.0, 1e11, 1000, 10_000, 22)
    with pytest.raises(PrivacyRefused, match="at least 1 is needed"):
        excess(1e-4, 100)


def test_the_shortfall_is_the_papers():
    # tau for two clients at sigma 0.5: 10 exp(-2 pi^2 / 4 / 2)
    assert shortfall(0.5, 2, 9) == pytest.approx(3 * 10 * math.exp(-(math.pi**2) / 4))
    assert shortfall(0.5, 1, 9) == 0
    assert shortfall(1.0, 5, 100) == pytest.approx(
        100 * sum(math.exp(-2 * math.pi**2 * k / (k + 1)) for k in range(1, 5))
    )
    assert shortfall(30.0, 1000, 10**6) == 0
    with pytest.raises(ValueError, match=r"must be at least 0\.5"):
        shortfall(0.4, 2, 1)


def test_the_sum_costs_no_more_than_its_zcdp():
    """The Rényi divergence of the sum of m discrete Gaussians and the same moved by s,
    computed from their probabilities.
    """
    for sigma, m, moved in ((0.6, 2, 1), (0.6, 5, 2), (1.0, 3, 4)):
        x = np.arange(-120, 121)
        one = np.exp(-(x**2) / (2 * sigma**2))
        one /= one.sum()
        whole = one
        for _ in range(m - 1):
            whole = np.convolve(whole, one)
        keep = whole > 1e-250
        a, b = whole[moved:], whole[:-moved]
        both = keep[moved:] & keep[:-moved]
        bound = (moved / (math.sqrt(m) * sigma) + shortfall(sigma, m, 1)) ** 2 / 2
        for order in (1.5, 2.0, 5.0, 16.0):
            log = order * np.log(a[both]) + (1 - order) * np.log(b[both])
            divergence = (log.max() + math.log(np.exp(log - log.max()).sum())) / (order - 1)
            assert divergence <= order * bound * (1 + 1e-9)


@pytest.mark.parametrize("z", [0.7, 1.0, 3.0])
def test_epsilon_is_no_less_than_with_a_trusted_coordinator_and_near_it(z):
    secret = plan_of(
        parse_job(
            "",
            [
                *BASE,
                "privacy.secure-aggregation=true",
                f"privacy.noise-multiplier={z}",
                "privacy.i-understand=true",
            ],
        ),
        1000,
    )
    trusted = plan_of(
        parse_job("", [*BASE, f"privacy.noise-multiplier={z}", "privacy.i-understand=true"]), 1000
    )
    ours, theirs = secret.reading(), trusted.reading()
    assert secret.release(["a"]).mechanism == "distributed" and fewest(secret.job) == 14
    assert theirs.epsilon <= ours.epsilon <= 1.12 * theirs.epsilon
    assert [name for name, _ in ours.by] == ["rdp"]
    gaussian = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    gaussian.compose(SelfComposedDpEvent(GaussianDpEvent(z), 30))
    assert ours.epsilon == pytest.approx(gaussian.get_epsilon(1e-5), rel=1e-6)


def test_zcdp_is_above_what_dp_accounting_reads_of_a_discrete_gaussian():
    z, sigma = 1.5, 30
    release = Release(
        release="updates", mechanism="distributed", unit="client", parts={"update": z}, clip=1.0, excess=1e-9
    )
    exact = (
        from_discrete_gaussian_mechanism(sigma, int(sigma / z), value_discretization_interval=1e-3)
        .self_compose(10)
        .get_epsilon_for_delta(1e-5)
    )
    assert exact < read_epsilon(history([release] * 10), 1e-5).epsilon <= 1.12 * exact


def test_an_epsilon_is_reached_by_calibration():
    plan = plan_of(parse_job("", [*BASE, "privacy.secure-aggregation=true", "privacy.epsilon=4.0"]), 1000)
    assert 3.9 < plan.reading().epsilon <= 4.0
    assert read_epsilon(plan.whole(), 1e-5).epsilon == plan.reading().epsilon
