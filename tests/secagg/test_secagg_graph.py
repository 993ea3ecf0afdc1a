"""Rings are symmetric and regular; degrees come from the formula,
checked with whole numbers and by drawing.
"""

from math import ceil, comb

import numpy as np
import pytest

from fedtune.secagg.graph import Design, design, neighbours


@pytest.mark.parametrize(
    "count, degree", [(2, 1), (5, 4), (5, 2), (9, 4), (40, 39), (10, 12), (11, 10), (12, 10)]
)
def test_neighbours_are_mutual_and_as_many_as_said(count, degree):
    found = neighbours(count, degree)
    assert all(
        len(n) == min(degree, count - 1) and sorted(set(n)) == list(n) and i not in n
        for i, n in enumerate(found)
    )
    assert all(i in found[j] for i, n in enumerate(found) for j in n)


@pytest.mark.parametrize("cohort, threshold", [(2, 2), (3, 2), (4, 3), (6, 4), (10, 7), (40, 27)])
def test_small_cohorts_are_complete(cohort, threshold):
    assert design(cohort) == Design(cohort - 1, threshold)


def enough(n, k, t, c, d, secrecy=40, correctness=30):
    """The three conditions with whole numbers, written from the docstring."""

    def tail(marked, least):
        return sum(comb(marked, i) * comb(n - 1 - marked, k - i) for i in range(least, k + 1))

    return (
        n * tail(c, t) << secrecy <= comb(n - 1, k)
        and (k // 2 > c + d or n * comb(n - k // 2, c + d - k // 2) << secrecy <= comb(n, c + d))
        and n * tail(d, k - t + 1) << correctness <= comb(n - 1, k)
    )


@pytest.mark.parametrize("cohort", [41, 60, 100, 200])
def test_degrees_are_the_smallest_that_meet_the_formula(cohort):
    found = design(cohort)
    c, d = ceil(cohort / 10), ceil(cohort / 5)
    assert found.degree < cohort - 1 and 2 * found.threshold > found.degree + 1
    assert enough(cohort, found.degree, found.threshold, c, d)
    smaller = found.degree - 2
    assert not any(enough(cohort, smaller, t, c, d) for t in range(smaller // 2 + 1, smaller + 1))


def test_drawn_drop_outs_leave_every_circle_enough():
    found, rng = design(100), np.random.default_rng(0)
    around = np.array(neighbours(100, found.degree))
    for _ in range(300):
        there = np.ones(100, bool)
        there[rng.choice(100, 20, replace=False)] = False
        assert there[around].sum(1).min() >= found.threshold


def test_more_collusion_or_drop_outs_take_more_neighbours():
    assert design(200, colluding=0.2).degree > design(200).degree < design(200, dropout=0.3).degree
    # no sparse graph holds; the complete one holds a third of drop-outs
    assert design(50, dropout=0.6) == Design(49, 34)
    with pytest.raises(ValueError, match="lower one of them"):
        design(5000, dropout=0.6)


@pytest.mark.parametrize(
    "cohort, options",
    [
        (1, {}),
        (2**15 + 1, {}),
        (50, {"colluding": 1.0}),
        (50, {"dropout": -0.1}),
        (50, {"dropout": float("nan")}),
    ],
)
def test_designs_out_of_bounds_are_refused(cohort, options):
    with pytest.raises(ValueError):
        design(cohort, **options)


@pytest.mark.parametrize("degree, threshold", [(0, 1), (1025, 600), (4, 2), (4, 6), (5, 3)])
def test_a_threshold_is_more_than_half_of_the_holders(degree, threshold):
    with pytest.raises(ValueError, match="must be"):
        Design(degree, threshold)
