"""The upper level against independent solvers and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize

from palimpsest.core.errors import InvalidHyperparameter, NonFiniteLoss
from palimpsest.study.worst_case.selection import (
    class_losses,
    indicator,
    non_binary_share,
    objective,
    project,
    top,
    upper_step,
)

VECTORS = st.lists(st.floats(-5, 5), min_size=2, max_size=30).map(np.array)


@settings(max_examples=100, deadline=None)
@given(VECTORS, st.data())
def test_the_projection_has_the_sum_and_solves_the_equation_for_mu(a, data):
    m = data.draw(st.integers(1, len(a) - 1))
    w = project(a, m, 1e-12)
    assert (w >= 0).all() and (w <= 1).all() and w.sum() == pytest.approx(m, abs=1e-9 * len(a))
    mu = brentq(lambda value: np.clip(a - value, 0, 1).sum() - m, a.min() - 1, a.max(), xtol=1e-13)
    np.testing.assert_allclose(w, np.clip(a - mu, 0, 1), atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(VECTORS, st.data())
def test_no_other_point_of_the_set_is_nearer(a, data):
    m = data.draw(st.integers(1, len(a) - 1))
    w = project(a, m, 1e-12)
    for chosen in (np.random.default_rng(seed).permutation(len(a))[:m] for seed in range(10)):
        other = indicator(chosen, len(a))
        # the inner product with every way into the set is at most 0: the condition for a nearest point
        assert (a - w) @ (other - w) <= 1e-7


def test_a_general_solver_finds_the_same_projection():
    a, m = np.random.default_rng(0).normal(size=8), 3
    found = minimize(
        lambda w: ((w - a) ** 2).sum(), np.full(8, m / 8), bounds=[(0, 1)] * 8, tol=1e-12,
        constraints={"type": "eq", "fun": lambda w: w.sum() - m},
    )  # fmt: skip
    np.testing.assert_allclose(project(a, m, 1e-12), found.x, atol=1e-5)


def test_the_published_tolerance_leaves_the_sum_within_its_bound():
    a = np.random.default_rng(0).random(1000)
    assert abs(project(a, 100).sum() - 100) <= 1e-5 * 1000
    assert abs(project(a, 100, 1e-10).sum() - 100) <= 1e-6


@pytest.mark.parametrize("m", [0, -1, 3, 4])
def test_a_size_that_leaves_nothing_on_one_side_is_refused(m):
    with pytest.raises(InvalidHyperparameter, match="strictly between 0 and 3"):
        project(np.zeros(3), m)


def test_the_worst_case_is_where_the_loss_is_low_and_the_easiest_where_it_is_high():
    losses, w = np.array([3.0, 0.1, 2.0, 0.2]), np.full(4, 0.5)
    assert top(upper_step(w, losses, 2, 10, 0.0, "hardest"), 2).tolist() == [1, 3]
    assert top(upper_step(w, losses, 2, 10, 0.0, "easiest"), 2).tolist() == [0, 2]


def test_a_large_step_goes_to_the_minimum_of_the_linear_objective_at_once():
    losses = np.random.default_rng(0).random(50)
    w = upper_step(indicator(range(5), 50), losses, 5, 1e9, 0.0)
    assert objective(w, losses) == pytest.approx(np.sort(losses)[:5].sum())
    assert non_binary_share(w) == 0


def test_the_penalty_draws_weights_towards_each_other():
    w = indicator([0, 1], 6)
    free, drawn = (upper_step(w, np.zeros(6), 2, 0.3, gamma, tolerance=1e-12) for gamma in (0.0, 0.5))
    np.testing.assert_allclose(free, w, atol=1e-9)
    # a = w - 0.3 * 2 * 0.5 * w = 0.7 w, and mu = -0.1
    np.testing.assert_allclose(drawn, [0.8, 0.8, 0.1, 0.1, 0.1, 0.1], atol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_losses_that_are_no_numbers_are_refused(value):
    with pytest.raises(NonFiniteLoss, match="on item 2"):
        upper_step(np.full(3, 0.5), np.array([0.0, 1.0, value]), 1, 1.0, 0.0)


def test_of_equal_weights_the_first_are_taken_in_order():
    assert top(np.array([0.5, 1.0, 0.5, 0.5, 0.0]), 3).tolist() == [0, 1, 2]


def test_shares_between_0_and_1_are_counted():
    assert non_binary_share(np.array([0.0, 1.0, 0.5, 1e-9])) == 0.25


def test_a_class_has_its_mean_loss_or_the_published_sum():
    losses, classes = np.array([1.0, 3.0, 5.0, 2.0, 4.0, 6.0]), np.array([0, 0, 1, 1, 1, 0])
    assert class_losses(losses, classes, 2).tolist() == [10 / 3, 11 / 3]
    # batches (1, 3 | 5, 2) and (| 4), (6 |): mean over count, in every batch
    expected = [2 / 2 + 6 / 1, 3.5 / 2 + 4 / 1]
    assert class_losses(losses, classes, 2, batch_size=4).tolist() == expected
