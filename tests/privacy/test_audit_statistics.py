"""What guesses prove: closed forms, mechanisms whose epsilon is known, and a slow twin of the p-value."""

import math

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from scipy import optimize, stats

from fedtune.privacy.audit import (
    CONFIDENCE,
    Outcome,
    accuracy,
    best_ceiling,
    count_right,
    expected_bound,
    lower_bound,
    p_value,
    planned_canaries,
    planned_guesses,
    take_guesses,
)
from fedtune.privacy.canaries import Directions, Sight, View, coins, evidence, rehearse

RUNS = 400
SEVERAL = stats.binom.ppf(1 - 1e-6, RUNS, 1 - CONFIDENCE)
"""More runs of RUNS in which a bound of 95 % fails are no accident."""


def gaussian(mu, delta):
    """Epsilon at `delta` of the Gaussian mechanism with sensitivity / standard deviation = mu, exactly:
    Balle and Wang 2018, arXiv:1805.06530, Theorem 8.
    """

    def excess(epsilon):
        return (
            stats.norm.cdf(mu / 2 - epsilon / mu)
            - math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))
            - delta
        )

    return optimize.brentq(excess, 0.0, 200.0)


def slow_p_value(m, r, v, epsilon, delta):
    """Term by term as in the theorem."""
    q = math.exp(epsilon) / (math.exp(epsilon) + 1)

    def f(k):
        return sum(math.comb(r, i) * q**i * (1 - q) ** (r - i) for i in range(max(k, 0), r + 1))

    return min(1.0, f(v) + 2 * m * delta * max((f(v - i) - f(v)) / i for i in range(1, v + 1)))


@pytest.mark.parametrize(
    ("m", "r", "v", "epsilon"),
    [(100, 40, 33, 1.0), (10, 10, 10, 0.0), (2000, 500, 400, 1.5), (50, 7, 0, 3.0)],
)
def test_without_delta_it_is_the_tail_of_a_binomial(m, r, v, epsilon):
    assert p_value(m, r, v, epsilon, 0.0) == pytest.approx(
        stats.binom.sf(v - 1, r, math.exp(epsilon) / (1 + math.exp(epsilon))), rel=1e-12
    )


@pytest.mark.parametrize(
    ("m", "r", "v", "epsilon", "delta"),
    [
        (100, 40, 38, 1.0, 1e-3),
        (300, 60, 60, 2.0, 1e-5),
        (300, 60, 45, 2.0, 1e-5),
        (20, 20, 20, 0.5, 0.01),
        (1000, 100, 80, 0.1, 1e-6),
        (50, 50, 26, 0.0, 1e-4),
    ],
)
def test_with_delta_it_is_the_theorem(m, r, v, epsilon, delta):
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(slow_p_value(m, r, v, epsilon, delta), rel=1e-9)


@pytest.mark.parametrize(
    "bad",
    [
        (10, 11, 5, 1.0, 0.0),
        (10, 5, 6, 1.0, 0.0),
        (10, 5, -1, 1.0, 0.0),
        (10, 5, 5, -1.0, 0.0),
        (10, 5, 5, 1.0, 2.0),
    ],
)
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        p_value(*bad)


def test_bounds_by_hand():
    """All of r right without delta: q^r = 0.05. Half of them right proves nothing."""
    assert lower_bound(100, 100, 100, 0.0) == pytest.approx(math.log(0.05**0.01 / (1 - 0.05**0.01)), abs=1e-5)
    assert lower_bound(100, 100, 50, 0.0) == 0.0 and lower_bound(4, 4, 4, 0.0) == 0.0
    found = [lower_bound(1000, 200, v, 1e-5) for v in (120, 150, 180, 195, 200)]
    assert found == sorted(found) and found[-1] == Outcome(1000, 200, 200, 3, 1e-5).ceiling
    assert [lower_bound(1000, 200, 190, d) for d in (0.0, 1e-6, 1e-4, 1e-2)] == sorted(
        (lower_bound(1000, 200, 190, d) for d in (0.0, 1e-6, 1e-4, 1e-2)), reverse=True
    )


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_randomised_response_is_not_overcharged(epsilon):
    """Every canary's bit is told rightly with probability e^epsilon / (e^epsilon + 1): exactly epsilon,
    and the hardest case there is.
    """
    right = np.random.default_rng(1).binomial(500, 1 / (1 + math.exp(-epsilon)), RUNS)
    found = np.array([lower_bound(500, 500, int(v), 0.0) for v in right])
    assert (found > epsilon).sum() <= SEVERAL
    assert epsilon == 0 or (found > epsilon).any()  # nor is there slack: the bound is one of 95 %


def test_randomised_response_is_found_by_many_canaries():
    right = np.random.default_rng(2).binomial(100_000, 1 / (1 + math.exp(-1.0)))
    assert 0.95 < lower_bound(100_000, 100_000, int(right), 0.0) < 1.0


@pytest.mark.parametrize("together", [False, True])
def test_what_gives_itself_away_with_chance_delta_is_not_overcharged(together):
    """Randomised response that, with chance delta, tells the truth and says so: of one canary by itself, or
    of all at once. The guesses are as good as can be: first those that are certain.
    """
    m, r, epsilon, delta = 300, 40, 1.0, 0.01
    rng, q = np.random.default_rng(3), 1 / (1 + math.exp(-1.0))
    certain = rng.binomial(m, delta, RUNS) if not together else m * (rng.random(RUNS) < delta)
    sure = np.minimum(certain, r)
    right = sure + rng.binomial(r - sure, q)
    assert (np.array([lower_bound(m, r, int(v), delta) for v in right]) > epsilon).sum() <= SEVERAL


def audited(m, r, mu, delta, rng, shrink=1.0):
    """The bound that m canaries show of a Gaussian mechanism that claims mu,
    and has that part of its noise.
    """
    inside = rng.random(m) < 0.5
    seen = inside + shrink * rng.standard_normal(m) / mu
    return lower_bound(m, r, count_right(take_guesses(evidence(seen, 1 / mu), r), inside), delta)


@pytest.mark.parametrize(("m", "mu", "delta"), [(1000, 1.0, 1e-5), (60, 1.0, 1e-2), (3000, 2.0, 1e-4)])
def test_the_gaussian_mechanism_is_not_overcharged(m, mu, delta):
    rng, true = np.random.default_rng(4), gaussian(mu, delta)
    assert true == pytest.approx(get_epsilon_gaussian(1 / mu, delta), rel=1e-6)
    rehearsed = accuracy(*rehearse(View(1 / mu, 1.0, 1)))
    r = planned_guesses(rehearsed, m, delta)
    found = [audited(m, r, mu, delta, rng) for _ in range(60)]
    assert max(found) <= true
    assert np.median(found) == pytest.approx(expected_bound(rehearsed, m, r, delta), abs=0.3)


def test_half_the_noise_of_a_gaussian_is_seen_with_many_canaries():
    """What the pipeline's tests rest on: at an epsilon of 2, 20,000 canaries see noise of half the size."""
    claimed, rng = gaussian(0.5, 1e-5), np.random.default_rng(5)
    r = planned_guesses(accuracy(*rehearse(View(2.0, 1.0, 1), shrink=0.5)), 20_000, 1e-5)
    found = [audited(20_000, r, 0.5, 1e-5, rng, 0.5) for _ in range(20)]
    assert claimed == pytest.approx(1.993, abs=1e-3) and np.mean(np.array(found) > claimed) >= 0.9


def test_a_rehearsal_is_what_will_be():
    """Accuracy by hand: of a Gaussian with mu = 2, those who are guessed at all are on their side
    of 1 with chance Phi(1).
    """
    right = accuracy(*rehearse(View(0.5, 1.0, 1)))
    assert right[-1] == pytest.approx(stats.norm.cdf(1.0), abs=0.02) and right[100] > 0.99
    assert rehearse(View(1.0, 0.1, 10**4))[0].shape == (300,)


def test_what_is_not_drawn_cannot_be_told():
    """One use that takes a canary with chance 1/4 and shows it plainly: at most 5 of 8 guesses are right."""
    assert accuracy(*rehearse(View(0.05, 0.25, 1)))[-1] == pytest.approx(5 / 8, abs=0.02)


@pytest.mark.parametrize("m", [1, 2, 5, 6, 7, 100, 3001])
@pytest.mark.parametrize("multiplier", [0.1, 1.0, 20.0])
def test_plans_fit(m, multiplier):
    rehearsed = accuracy(*rehearse(View(multiplier, 1.0, 1)))
    r, few = planned_guesses(rehearsed, m, 1e-5), planned_canaries(rehearsed, m, 1e-5)
    assert 1 <= r <= m and 1 <= few <= m
    assert best_ceiling(m, 1e-5) >= lower_bound(m, r, r, 1e-5) - 1e-9


def test_where_delta_is_large_fewer_canaries_are_taken():
    rehearsed = accuracy(*rehearse(View(1.0, 1.0, 1), shrink=0.5))
    assert (
        planned_canaries(rehearsed, 10_000, 1e-2) < 100 < planned_canaries(rehearsed, 10_000, 1e-6) == 10_000
    )


def test_guesses_are_made_where_evidence_is_strongest():
    seen = np.array([0.1, -3.0, 2.0, 0.0, -0.5])
    assert take_guesses(seen, 3).tolist() == [0, -1, 1, 0, -1]
    assert take_guesses(seen, 5).tolist() == [1, -1, 1, 0, -1]  # of what was not seen there is nothing to say
    assert count_right(take_guesses(seen, 3), np.array([True, False, True, True, True])) == 2


@pytest.mark.parametrize("numbers", [1, 3, 64, 100, 1000])
def test_directions_are_orthonormal(numbers):
    directions = Directions(numbers, 7)
    places, values = directions.vectors(np.arange(directions.count))
    whole = np.zeros((directions.count, numbers), np.float32)
    whole[np.arange(directions.count)[:, None], places] = values
    np.testing.assert_allclose(whole @ whole.T, np.eye(directions.count), atol=1e-6)
    x = np.random.default_rng(0).standard_normal(numbers)
    np.testing.assert_allclose(directions.along(x), whole @ x, atol=1e-6)


@pytest.mark.parametrize(("rate", "replaced"), [(1.0, False), (0.2, False), (0.2, True)])
def test_evidence_is_the_ratio_of_likelihoods(rate, replaced):
    x, z = np.linspace(-4, 4, 9), 0.7

    def density(side):
        return (1 - rate) * stats.norm.pdf(x, 0, z) + rate * stats.norm.pdf(x, side, z)

    np.testing.assert_allclose(
        evidence(x, z, rate, replaced),
        np.log(density(1.0) / (density(-1.0) if replaced else stats.norm.pdf(x, 0, z))),
        atol=1e-9,
    )


@pytest.mark.parametrize("shrink", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("replaced", [False, True])
def test_the_noise_that_is_there_is_found_without_looking_at_coins(shrink, replaced):
    """Evidence is then of the true noise, and better for it."""
    rng, m, uses, rate, view = np.random.default_rng(6), 4000, 8, 0.25, View(0.8, 0.25, 8, replaced)
    inside, sight = rng.random(m) < 0.5, Sight.of(view, m)
    pull = np.where(inside, 1.0, -1.0 if replaced else 0.0)
    seen = pull * (rng.random((uses, m)) < rate) + shrink * 0.8 * rng.standard_normal((uses, m))
    sight.add(slice(None), seen[:3])
    sight.add(np.arange(m), seen[3:])
    np.testing.assert_allclose(
        sight.evidence(), evidence(seen, shrink * 0.8, rate, replaced).sum(0), atol=1e-9
    )
    assert (
        accuracy(sight.evidence(), inside)[-1]
        >= accuracy(evidence(seen, 0.8, rate, replaced).sum(0), inside)[-1]
    )


def test_coins_are_fair_and_their_own():
    drawn = coins(10_000, 1)
    assert (
        abs(drawn.mean() - 0.5) < 0.03
        and (drawn == coins(10_000, 1)).all()
        and not (drawn == coins(10_000, 2)).all()
    )
