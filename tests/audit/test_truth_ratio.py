"""Truth ratio and forget quality against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.audit import truth_ratio
from palimpsest.core.errors import InvalidAudit

LOSS = st.floats(0, 20)


@given(LOSS, st.lists(LOSS, min_size=1, max_size=5))
def test_the_truth_ratio_agrees_with_both_definitions(true: float, wrong: list[float]):
    arrays = np.array([true]), np.array([wrong])
    probabilities = [math.exp(-loss) for loss in wrong]
    geometric = math.prod(probabilities) ** (1 / len(wrong)) / math.exp(-true)
    arithmetic = sum(probabilities) / len(wrong) / math.exp(-true)
    assert truth_ratio.truth_ratios(*arrays)[0] == pytest.approx(geometric, rel=1e-9)
    assert truth_ratio.truth_ratios(*arrays, mean="arithmetic")[0] == pytest.approx(arithmetic, rel=1e-9)
    assert arithmetic >= geometric * (1 - 1e-9)


def test_a_model_that_knows_the_truth_has_a_ratio_below_one():
    assert truth_ratio.truth_ratios(np.array([0.1]), np.array([[4.0, 5.0]]))[0] < 1


def test_a_collapsed_model_whose_probabilities_underflow_keeps_its_ratio():
    for mean in ("geometric", "arithmetic"):
        ratio = truth_ratio.truth_ratios(np.array([2000.0]), np.array([[2001.0, 2001.0]]), mean)
        assert ratio[0] == pytest.approx(math.exp(-1))


def test_aggregation_of_the_forget_set_is_symmetric_and_of_the_others_is_not():
    ratios = np.array([0.25, 4.0])
    assert truth_ratio.closer_to_one(ratios) == 0.25
    assert truth_ratio.truth_preferred(ratios) == pytest.approx(0.375)
    assert truth_ratio.closer_to_one(np.array([1.0])) == 1
    assert truth_ratio.closer_to_one(np.array([0.0, math.inf])) == 0


def test_forget_quality_is_one_against_itself_and_tiny_where_nothing_overlaps():
    ratios = {str(index): float(value) for index, value in enumerate(np.linspace(0.1, 0.9, 40))}
    same = truth_ratio.forget_quality(ratios, ratios)
    apart = truth_ratio.forget_quality(ratios, {item: value + 1 for item, value in ratios.items()})
    assert same.p == 1 and same.statistic == 0 and same.n == 40 and same.forgotten
    assert apart.p == apart.smallest_p and apart.statistic == 1 and not apart.forgotten
    assert apart.smallest_p == pytest.approx(2 / math.comb(80, 40), rel=1e-6)


def test_no_more_than_1e_239_can_be_seen_on_the_400_questions_of_forget10():
    assert truth_ratio.smallest_p(400) == pytest.approx(2 / math.comb(800, 400), rel=1e-6)
    assert 1e-239 < truth_ratio.smallest_p(400) < 1.1e-239  # what the leaderboard prints after collapse


def test_forget_quality_goes_by_rank_and_keeps_the_direction():
    random = np.random.default_rng(0)
    one = {str(i): float(v) for i, v in enumerate(random.uniform(0.2, 0.9, 30))}
    other = {item: 1 / value for item, value in one.items()}
    inverted = [{item: 1 / value for item, value in side.items()} for side in (one, other)]
    assert truth_ratio.forget_quality(one, other).p == truth_ratio.forget_quality(*inverted).p < 1e-6
    folded = [{item: min(v, 1 / v) for item, v in side.items()} for side in (one, other)]
    assert truth_ratio.forget_quality(*folded).p == 1  # the mistake of folding first


def test_items_are_matched_by_key_and_not_by_order():
    one, other = {"0": 0.1, "1": 0.9}, {"1": 0.9, "0": 0.1}
    assert truth_ratio.forget_quality(one, other).p == 1
    with pytest.raises(InvalidAudit, match="other items"):
        truth_ratio.forget_quality(one, {"0": 0.1, "7": 0.9})
    with pytest.raises(InvalidAudit, match="no item"):
        truth_ratio.forget_quality({}, {})
    with pytest.raises(InvalidAudit, match="positive"):
        truth_ratio.forget_quality(one, {"0": math.nan, "1": 0.9})


@pytest.mark.parametrize(
    ("correct", "wrong", "message"),
    [
        ([1.0, 1.0], [[1.0, 2.0], [1.0]], "as many wrong answers"),
        ([math.nan], [[1.0]], "true answers are negative or not finite in rows 0"),
        ([1.0], [[-1.0]], "wrong answers are negative"),
        ([1.0], [[]], "are needed"),
        ([], [], "are needed"),
    ],
)
def test_losses_that_cannot_be_are_refused(correct: list[float], wrong: list[list[float]], message: str):
    with pytest.raises(InvalidAudit, match=message):
        truth_ratio.truth_ratios(correct, wrong)  # pyright: ignore[reportArgumentType]


def test_an_unknown_mean_is_refused():
    with pytest.raises(InvalidAudit, match="geometric"):
        truth_ratio.truth_ratios(np.ones(1), np.ones((1, 2)), "harmonic")  # pyright: ignore[reportArgumentType]


def test_probabilities_are_shares():
    assert truth_ratio.truth_probabilities(np.array([0.0]), np.array([[0.0]]))[0] == pytest.approx(0.5)
    found = truth_ratio.option_probabilities(np.array([0.0]), np.array([[math.log(2)] * 2]))
    assert found[0] == pytest.approx(0.5)
