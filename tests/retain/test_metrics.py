from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InvalidAudit
from palimpsest.core.matrix import ScoreMatrix
from palimpsest.retain.metrics import (
    History,
    accuracy_interval,
    average_accuracy,
    drop_from_best,
    largest_drop,
    largest_rise,
    learning_curve_area,
    minimum_accuracies,
    minimum_accuracy,
    positive_backward_transfer,
    sampling_intervals,
    summary,
    upper_mean,
    windowed,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)

LIVES = st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=1, max_size=25)


def of_lives(lives, starts):
    """A history from each task's accuracies since it was met; all end together."""
    learning, rows = [], []
    for now in range(len(lives[0])):
        met = [task for task, start in enumerate(starts) if start <= now]
        learning.append(met[-1])
        rows.append(tuple(lives[task][now - starts[task]] for task in met))
    return History(tuple(learning), tuple(rows))


TWO = of_lives([[0.2, 0.9, 0.4, 0.1, 0.8], [0.3, 0.7, 0.9]], [0, 2])


def test_the_minimum_leaves_out_a_tasks_own_training():
    assert minimum_accuracies(TWO) == {0: 0.1}
    assert minimum_accuracy(TWO) == pytest.approx(0.1)
    assert worst_case_accuracy(TWO) == pytest.approx(0.9 / 2 + 0.1 / 2)
    assert average_accuracy(TWO) == pytest.approx(0.85)


def test_it_is_the_mean_of_the_minima_not_the_minimum_of_the_mean():
    history = of_lives([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0]], [0, 1, 2])
    assert minimum_accuracies(history) == {0: 0.0, 1: 0.0}
    assert min(np.mean(row[:2]) for row in history.accuracy[2:]) == 0.5
    assert minimum_accuracy(history) == 0.0


def test_with_one_task_there_is_no_minimum():
    history = of_lives([[0.2, 0.9]], [0])
    assert minimum_accuracy(history) is None
    assert worst_case_accuracy(history) == 0.9
    assert summary(history)["min-ACC"] is None


@given(LIVES, st.integers(2, 12))
@settings(max_examples=100, deadline=None)
def test_drops_and_rises_within_windows_are_those_of_trying_every_pair(values, window):
    history = of_lives([values], [0])
    pairs = [(m, n) for n in range(len(values)) for m in range(max(0, n - window + 1), n)]
    drop = max([0.0, *(values[m] - values[n] for m, n in pairs)])
    rise = max([0.0, *(values[n] - values[m] for m, n in pairs)])
    assert windowed(history, window)[0] == pytest.approx(drop)
    assert windowed(history, window, plasticity=True)[0] == pytest.approx(rise)
    released = windowed(history, window, plasticity=True, as_released=True)[0]
    assert released <= rise + 1e-12


@given(LIVES)
@settings(max_examples=100, deadline=None)
def test_the_largest_drop_and_rise_of_a_window_are_those_of_trying_every_pair(values):
    pairs = [(m, n) for n in range(len(values)) for m in range(n)]
    assert largest_drop(values) == pytest.approx(max([values[m] - values[n] for m, n in pairs], default=0))
    assert largest_rise(values) == pytest.approx(max([values[n] - values[m] for m, n in pairs], default=0))


def test_the_released_rise_skips_low_starts():
    assert largest_rise([0.5, 0.1, 0.9]) == pytest.approx(0.8)
    assert largest_rise([0.5, 0.1, 0.9], as_released=True) == pytest.approx(0.4)


def test_forgetting_and_plasticity_are_means_over_tasks():
    assert windowed_forgetting(TWO, 3) == pytest.approx((0.8 + 0.0) / 2)
    assert windowed_plasticity(TWO, 3) == pytest.approx((0.7 + 0.6) / 2)


def test_the_learning_curve_counts_a_tasks_own_training_and_only_complete_starts():
    assert learning_curve_area(TWO, 2) == pytest.approx(((0.2 + 0.9) / 2 + (0.3 + 0.7) / 2) / 2)
    assert learning_curve_area(TWO, 3) == pytest.approx((0.3 + 0.7 + 0.9) / 3)
    assert learning_curve_area(TWO, 9) is None


def test_an_interval_holds_the_accuracy_and_is_exact():
    low, high = accuracy_interval(0.9, 200)
    assert low < 0.9 < high and accuracy_interval(1.0, 20)[0] == pytest.approx(0.025 ** (1 / 20))


def test_bad_histories_and_windows_are_refused():
    with pytest.raises(InvalidAudit, match="before the first"):
        worst_case_accuracy(History((), ()))
    with pytest.raises(InvalidAudit, match="outside"):
        History((0,), ((1.2,),))
    with pytest.raises(InvalidAudit, match="outside"):
        History((0,), ((float("nan"),),))
    with pytest.raises(InvalidAudit, match="2 tasks were met"):
        History((1,), ((0.5,),))
    with pytest.raises(InvalidAudit, match="at least 2"):
        windowed(TWO, 1)
    with pytest.raises(InvalidAudit, match="at least 1"):
        learning_curve_area(TWO, 0)


def test_measures_of_the_whole_matrix_that_online_papers_report():
    matrix = ScoreMatrix(np.array([[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.7, 0.9, 0.5]]))
    assert drop_from_best(matrix) == pytest.approx((0.9 - 0.7 + 0.9 - 0.9 + 0.5 - 0.5) / 3)
    assert upper_mean(matrix) == pytest.approx((0.1 + 0.0 + 0.2) / 3)
    assert positive_backward_transfer(matrix) == 0  # (-0.3 - 0.2 + 0.1) / 3
    risen = ScoreMatrix(np.array([[0.5, 0.0], [0.8, 0.5]]))
    assert positive_backward_transfer(risen) == pytest.approx(0.3)


def test_sampling_intervals_hold_the_truth_as_often_as_they_say_though_the_lowest_is_chosen():
    random, held, windows = np.random.default_rng(0), 0, 0
    truth = np.array([[0.9, 0.4, 0.3, 0.35, 0.5, 0.45], [0.8] * 6])
    for _ in range(200):
        drawn = random.binomial(40, truth) / 40
        rows = [(drawn[0, 0],), *(tuple(drawn[:, now]) for now in range(1, 6))]
        history = History((0, 1, 1, 1, 1, 1), tuple(rows), sizes=(40, 40))
        found, value = sampling_intervals(history), minimum_accuracy(history)
        assert found["min-ACC"][0] <= value <= found["min-ACC"][1]
        assert found["WC-ACC"][0] <= worst_case_accuracy(history) <= found["WC-ACC"][1]
        assert found["WF10"][0] <= windowed_forgetting(history, 10) <= found["WF10"][1]
        assert found["WP10"][0] <= windowed_plasticity(history, 10) <= found["WP10"][1]
        held += found["min-ACC"][0] <= 0.3 <= found["min-ACC"][1]
        windows += found["WF10"][0] <= 0.3 <= found["WF10"][1]  # (0.9 - 0.3 + 0.8 - 0.8) / 2
    assert held >= 190 and windows >= 190


def test_a_drop_that_no_draw_could_have_made_is_told_from_none():
    steady = History((0,) * 6, ((0.9,), (0.88,), (0.9,), (0.89,), (0.9,), (0.9,)), sizes=(1000,))
    fallen = History((0,) * 6, ((0.9,), (0.4,), (0.9,), (0.9,), (0.9,), (0.9,)), sizes=(1000,))
    assert sampling_intervals(steady)["WF10"][0] == 0 < sampling_intervals(steady)["WF10"][1] < 0.15
    assert 0.4 < sampling_intervals(fallen)["WF10"][0] < 0.5 < sampling_intervals(fallen)["WP10"][1]
    assert sampling_intervals(fallen, windows=[3]).keys() == {"ACC", "WC-ACC", "WF3", "WP3"}


def test_one_task_has_the_exact_interval_of_its_accuracy_and_no_minimum():
    history = History((0, 0), ((0.2,), (0.9,)), sizes=(20,))
    found = sampling_intervals(history)
    assert found["WC-ACC"] == found["ACC"] == accuracy_interval(0.9, 20) and "min-ACC" not in found
    assert sampling_intervals(History((), ())) == {} == sampling_intervals(of_lives([[0.5]], [0]))
