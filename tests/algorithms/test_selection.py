"""Who trains what by scores: the objective by its definition, against every choice there is,
and against an integer program.
"""

from itertools import combinations, product

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from fedtune.algorithms.selection import choose, normalised, objective


def by_definition(chosen, shares, consistency):
    """As the paper writes it, with pairs written out."""
    m = chosen.astype(float)
    return (m * shares).sum() - consistency * sum(
        ((m[i] - m[j]) ** 2).sum() for i, j in combinations(range(len(m)), 2)
    )


def best_of_all(shares, budgets, consistency, depths=None):
    blocks = shares.shape[1]
    depths = [blocks] * len(shares) if depths is None else depths
    rows = [
        [
            row
            for row in product((False, True), repeat=blocks)
            if 1 <= sum(row) <= most and not any(row[: blocks - depth])
        ]
        for most, depth in zip(budgets, depths)
    ]
    return max(by_definition(np.array(chosen), shares, consistency) for chosen in product(*rows))


def best_of_program(shares, budgets, consistency, depths=None):
    """The same maximum as an integer linear program: d >= |m_i - m_j| for each pair and block."""
    n, blocks = shares.shape
    pairs = [(i, j, b) for i, j in combinations(range(n), 2) for b in range(blocks)]
    cost = np.concatenate([-shares.ravel(), np.full(len(pairs), consistency)])
    rows, most, least = (
        np.zeros((n + 2 * len(pairs), len(cost))),
        np.zeros(n + 2 * len(pairs)),
        np.full(n + 2 * len(pairs), -np.inf),
    )
    for i in range(n):
        rows[i, i * blocks : (i + 1) * blocks], most[i], least[i] = 1, budgets[i], 1
    for place, (i, j, b) in enumerate(pairs):
        for half, sign in enumerate((1, -1)):
            row = rows[n + 2 * place + half]
            row[i * blocks + b], row[j * blocks + b], row[n * blocks + place] = sign, -sign, -1
    whole = np.concatenate([np.ones(n * blocks), np.zeros(len(pairs))])
    upper = np.ones(len(cost))
    for i, depth in enumerate(depths if depths is not None else ()):
        upper[i * blocks : (i + 1) * blocks - depth] = 0
    found = milp(
        cost, constraints=LinearConstraint(rows, least, most), integrality=whole, bounds=Bounds(0, upper)
    )
    assert found.success
    return -found.fun


def draw(seed, clients, blocks):
    rng = np.random.default_rng(seed)
    return normalised(rng.gamma(0.5, size=(clients, blocks))), rng.integers(1, blocks + 1, clients)


def gap(best, found):
    return (best - found) / best


def test_small_cases_against_every_choice():
    gaps = []
    for seed in range(24):
        shares, budgets = draw(seed, 3, 4)
        for consistency in (0.0, 0.03, 0.1, 0.5, 3.0):
            chosen = choose(shares, budgets, consistency)
            assert (chosen.sum(1) >= 1).all() and (chosen.sum(1) <= budgets).all()
            assert objective(chosen, shares, consistency) == pytest.approx(
                by_definition(chosen, shares, consistency), abs=1e-12
            )
            gaps.append(
                gap(best_of_all(shares, budgets, consistency), objective(chosen, shares, consistency))
            )
    gaps = np.array(gaps)
    assert (gaps > -1e-9).all() and (gaps < 1e-9).mean() > 0.95 and gaps.max() < 0.15


def test_middle_cases_against_an_integer_program():
    gaps = []
    for seed in range(4):
        shares, budgets = draw(100 + seed, 5, 6)
        for consistency in (0.01, 0.05):
            found = objective(choose(shares, budgets, consistency), shares, consistency)
            gaps.append(gap(best_of_program(shares, budgets, consistency), found))
    assert min(gaps) > -1e-6 and np.mean(gaps) < 0.01 and max(gaps) < 0.05


def test_the_two_checks_agree():
    for seed in range(5):
        shares, budgets = draw(seed, 3, 4)
        assert best_of_program(shares, budgets, 0.1) == pytest.approx(best_of_all(shares, budgets, 0.1))
        shares, budgets, depths = draw_with_depths(seed, 3, 4)
        assert best_of_program(shares, budgets, 0.1, depths) == pytest.approx(
            best_of_all(shares, budgets, 0.1, depths)
        )


def draw_with_depths(seed, clients, blocks):
    """Scores with sum 1 over the blocks that each client reaches."""
    scores, budgets = draw(seed, clients, blocks)
    depths = np.random.default_rng(1000 + seed).integers(1, blocks + 1, clients)
    scores = np.array(
        [
            [score if block >= blocks - depth else 0.0 for block, score in enumerate(row)]
            for row, depth in zip(scores, depths)
        ]
    )
    return scores / scores.sum(1, keepdims=True), budgets, depths


def test_small_cases_with_depths_against_every_choice():
    gaps = []
    for seed in range(24):
        shares, budgets, depths = draw_with_depths(seed, 3, 4)
        for consistency in (0.0, 0.03, 0.1, 0.5, 3.0):
            # what lies too deep counts for nothing, however much it matters
            chosen = choose(shares + (shares == 0) * 9.0, budgets, consistency, depths)
            assert (chosen.sum(1) >= 1).all() and (chosen.sum(1) <= budgets).all()
            assert not any(row[: 4 - depth].any() for row, depth in zip(chosen, depths))
            gaps.append(
                gap(best_of_all(shares, budgets, consistency, depths), objective(chosen, shares, consistency))
            )
    gaps = np.array(gaps)
    assert (gaps > -1e-9).all() and (gaps < 1e-9).mean() > 0.95 and gaps.max() < 0.15


def test_middle_cases_with_depths_against_an_integer_program():
    gaps = []
    for seed in range(4):
        shares, budgets, depths = draw_with_depths(100 + seed, 5, 6)
        for consistency in (0.01, 0.05):
            found = objective(choose(shares, budgets, consistency, depths), shares, consistency)
            gaps.append(gap(best_of_program(shares, budgets, consistency, depths), found))
    assert min(gaps) > -1e-6 and np.mean(gaps) < 0.01 and max(gaps) < 0.05


def test_without_consistency_each_takes_its_own_largest():
    shares, budgets = draw(0, 20, 12)
    chosen = choose(shares, budgets, 0.0)
    for row, taken, most in zip(shares, chosen, budgets):
        assert set(np.flatnonzero(taken)) == set(np.argsort(row)[-most:])


def test_with_much_of_it_all_take_what_is_largest_together():
    shares, _ = draw(1, 20, 12)
    chosen = choose(shares, np.full(20, 3), 10.0)
    assert (chosen == chosen[0]).all() and set(np.flatnonzero(chosen[0])) == set(
        np.argsort(shares.sum(0))[-3:]
    )


def test_of_equal_blocks_the_upper_are_taken():
    chosen = choose(np.ones((2, 5)), np.array([2, 1]), 0.0)
    assert chosen.tolist() == [[False, False, False, True, True], [False, False, False, False, True]]


def test_scores_have_no_unit():
    scores = np.array([[1.0, 3.0], [0.0, 0.0], [1e-30, 0.0]])
    np.testing.assert_allclose(normalised(scores), [[0.25, 0.75], [0.5, 0.5], [1, 0]])
    np.testing.assert_allclose(normalised(1e6 * scores), normalised(scores))


def test_nobody_is_left_without_a_block():
    """Three clients that each have a block of their own, and one to which all are alike: agreeing with
    nobody is dear, and idling is not allowed.
    """
    scores = np.full((4, 12), 1e-3)
    scores[[0, 1, 2], [0, 1, 2]], scores[3] = 1.0, 1.0
    for consistency in (0.05, 0.1, 1.0, 100.0):
        assert choose(scores, np.ones(4, int), consistency).sum(1).tolist() == [1, 1, 1, 1]
