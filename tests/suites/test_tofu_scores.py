"""Scores of TOFU against closed forms, and its published figures where the logs are at hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.core.errors import InvalidAudit, InvalidRecords
from palimpsest.suites import tofu_logs, tofu_scores
from palimpsest.suites.tofu_scores import SetLosses, SetScores
from tests.suites.published import published

LOSS = st.floats(0, 20)


def losses(n: int, wrong: int = 5, seed: int = 0, start: int = 0) -> dict[str, Any]:
    """One file of a published log."""
    random = np.random.default_rng(seed)
    items = [str(start + index) for index in range(n)]
    columns = {
        "avg_gt_loss": random.uniform(0, 3, n),
        "avg_paraphrased_loss": random.uniform(0, 3, n),
        "average_perturb_loss": random.uniform(0, 5, (n, wrong)),
        "rougeL_recall": random.uniform(0.1, 1, n),
    }
    return {name: dict(zip(items, values.tolist(), strict=True)) for name, values in columns.items()}


def log(seed: int = 0) -> dict[str, Any]:
    return {
        file: losses(12, 5 if file.startswith("eval_log") else 3, seed + index)
        for index, file in enumerate(tofu_logs.FILES)
    }


@given(LOSS, st.lists(LOSS, min_size=1, max_size=5))
def test_the_truth_ratio_agrees_with_both_definitions(true: float, wrong: list[float]):
    arrays = np.array([true]), np.array([wrong])
    probabilities = [math.exp(-loss) for loss in wrong]
    geometric = math.prod(probabilities) ** (1 / len(wrong)) / math.exp(-true)
    arithmetic = sum(probabilities) / len(wrong) / math.exp(-true)
    assert tofu_scores.truth_ratios(*arrays)[0] == pytest.approx(geometric, rel=1e-9)
    assert tofu_scores.truth_ratios(*arrays, mean="arithmetic")[0] == pytest.approx(arithmetic, rel=1e-9)
    assert arithmetic >= geometric * (1 - 1e-9)


def test_a_model_that_knows_the_truth_has_a_ratio_below_one():
    assert tofu_scores.truth_ratios(np.array([0.1]), np.array([[4.0, 5.0]]))[0] < 1


def test_a_collapsed_model_whose_probabilities_underflow_keeps_its_ratio():
    for mean in ("geometric", "arithmetic"):
        ratio = tofu_scores.truth_ratios(np.array([2000.0]), np.array([[2001.0, 2001.0]]), mean)
        assert ratio[0] == pytest.approx(math.exp(-1))


def test_aggregation_of_the_forget_set_is_symmetric_and_of_the_others_is_not():
    ratios = np.array([0.25, 4.0])
    assert tofu_scores.closer_to_one(ratios) == 0.25
    assert tofu_scores.truth_preferred(ratios) == pytest.approx(0.375)
    assert tofu_scores.closer_to_one(np.array([1.0])) == 1
    assert tofu_scores.closer_to_one(np.array([0.0, math.inf])) == 0


def test_the_probability_of_a_set_with_options_is_a_share():
    set_losses = SetLosses(
        ("0",), np.array([0.0]), np.array([0.0]), np.array([[math.log(2)] * 2]), np.ones(1)
    )
    assert tofu_scores.set_scores("world_facts", set_losses).probability == pytest.approx(0.5)
    assert tofu_scores.set_scores("retain", set_losses).probability == 1
    assert tofu_scores.truth_probabilities(np.array([0.0]), np.array([[0.0]]))[0] == pytest.approx(0.5)


def test_utility_is_the_harmonic_mean_of_nine():
    scores = {name: SetScores(0.5, 0.25, 1.0) for name in tofu_scores.UTILITY_SETS}
    assert tofu_scores.model_utility(scores) == pytest.approx(9 / (3 * (2 + 4 + 1)))
    scores["forget"] = SetScores(0.0, 0.0, 0.0)
    assert tofu_scores.model_utility(scores) == pytest.approx(3 / 7)


def test_an_incomplete_set_of_nine_is_refused_and_one_zero_makes_zero():
    scores = {name: SetScores(0.5, 0.5, 0.5) for name in tofu_scores.UTILITY_SETS}
    with pytest.raises(InvalidAudit, match="missing: world_facts"):
        tofu_scores.model_utility({name: scores[name] for name in ("retain", "real_authors")})
    scores["retain"] = SetScores(0.5, math.nan, 0.5)
    with pytest.raises(InvalidAudit, match="not defined"):
        tofu_scores.model_utility(scores)
    scores["retain"] = SetScores(0.5, 0.0, 0.5)
    with pytest.warns(UserWarning, match="makes the harmonic mean 0"):
        assert tofu_scores.model_utility(scores) == 0


def test_forget_quality_is_one_against_itself_and_tiny_where_nothing_overlaps():
    ratios = {str(index): float(value) for index, value in enumerate(np.linspace(0.1, 0.9, 40))}
    same = tofu_scores.forget_quality(ratios, ratios)
    apart = tofu_scores.forget_quality(ratios, {item: value + 1 for item, value in ratios.items()})
    assert same.p == 1 and same.statistic == 0 and same.n == 40 and same.forgotten
    assert apart.p == apart.smallest_p and apart.statistic == 1 and not apart.forgotten
    assert apart.smallest_p == pytest.approx(2 / math.comb(80, 40), rel=1e-6)


def test_no_more_than_1e_239_can_be_seen_on_the_400_questions_of_forget10():
    assert tofu_scores.smallest_p(400) == pytest.approx(2 / math.comb(800, 400), rel=1e-6)
    assert 1e-239 < tofu_scores.smallest_p(400) < 1.1e-239  # what the leaderboard prints after collapse


def test_forget_quality_goes_by_rank_and_keeps_the_direction():
    random = np.random.default_rng(0)
    one = {str(i): float(v) for i, v in enumerate(random.uniform(0.2, 0.9, 30))}
    other = {item: 1 / value for item, value in one.items()}
    inverted = [{item: 1 / value for item, value in side.items()} for side in (one, other)]
    assert tofu_scores.forget_quality(one, other).p == tofu_scores.forget_quality(*inverted).p < 1e-6
    folded = [{item: min(v, 1 / v) for item, v in side.items()} for side in (one, other)]
    assert tofu_scores.forget_quality(*folded).p == 1  # the mistake of folding first


def test_items_are_matched_by_key_and_not_by_order():
    one, other = {"0": 0.1, "1": 0.9}, {"1": 0.9, "0": 0.1}
    assert tofu_scores.forget_quality(one, other).p == 1
    with pytest.raises(InvalidAudit, match="other items"):
        tofu_scores.forget_quality(one, {"0": 0.1, "7": 0.9})
    with pytest.raises(InvalidAudit, match="no item"):
        tofu_scores.forget_quality({}, {})
    with pytest.raises(InvalidAudit, match="positive"):
        tofu_scores.forget_quality(one, {"0": math.nan, "1": 0.9})


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
        tofu_scores.truth_ratios(correct, wrong)  # pyright: ignore[reportArgumentType]


def test_an_unknown_mean_is_refused():
    with pytest.raises(InvalidAudit, match="geometric"):
        tofu_scores.truth_ratios(np.ones(1), np.ones((1, 2)), "harmonic")  # pyright: ignore[reportArgumentType]


def test_the_order_of_items_in_the_columns_of_a_log_does_not_matter():
    whole = log()
    shuffled = {
        file: {name: dict(reversed(column.items())) for name, column in columns.items()}
        for file, columns in whole.items()
    }
    shuffled["eval_log.json"]["avg_gt_loss"] = whole["eval_log.json"]["avg_gt_loss"]
    one, other = tofu_logs.log_scores(whole), tofu_logs.log_scores(shuffled)
    assert other.utility == pytest.approx(one.utility)
    assert tofu_logs.log_forget_quality(whole, shuffled).p == 1


def test_the_mean_of_wrong_answers_is_named_and_changes_the_utility():
    geometric, arithmetic = (tofu_logs.log_scores(log(), mean) for mean in ("geometric", "arithmetic"))
    assert geometric.mean == "geometric" and arithmetic.mean == "arithmetic"
    assert geometric.utility > arithmetic.utility


def test_a_log_without_the_forget_file_still_has_a_utility_and_one_without_another_has_not():
    partial = log()
    del partial["eval_log_forget.json"]
    assert "forget" not in tofu_logs.log_scores(partial).sets
    del partial["eval_log.json"]
    with pytest.raises(InvalidRecords, match=r"no 'eval_log.json'"):
        tofu_logs.log_scores(partial)


def test_damaged_logs_name_the_file_and_the_metric(tmp_path: Path):
    broken = log()
    del broken["eval_log.json"]["rougeL_recall"]
    with pytest.raises(InvalidRecords, match="lacks rougeL_recall"):
        tofu_logs.log_scores(broken)
    broken = log()
    del broken["eval_log.json"]["avg_gt_loss"]["3"]
    with pytest.raises(InvalidRecords, match="other items: '3'"):
        tofu_logs.log_scores(broken)
    broken = log()
    broken["eval_log.json"]["average_perturb_loss"]["3"].pop()
    with pytest.raises(InvalidRecords, match=r"lists of \[4, 5\]"):
        tofu_logs.log_scores(broken)
    broken = log()
    broken["eval_log.json"]["avg_gt_loss"]["3"] = math.nan
    with pytest.raises(InvalidAudit, match="answer are negative or not finite: items '3'"):
        tofu_logs.log_scores(broken)
    path = tmp_path / "eval_log_aggregated.json"
    path.write_text(json.dumps(log()))
    assert tofu_logs.log_scores(tofu_logs.read_log(path)).utility == tofu_logs.log_scores(log()).utility
    path.write_text(path.read_text()[:100])
    with pytest.raises(InvalidRecords, match="cannot be read"):
        tofu_logs.read_log(path)
    path.write_text("{}")
    with pytest.raises(InvalidRecords, match="no evaluation log"):
        tofu_logs.read_log(path)


FIGURES = {
    "llama2-7b_full_wd0.01": (0.6227, 0.5859, 0.991, 0.985, 0.516),
    "llama2-7b_retain90_wd0.01": (0.6137, 0.5752, 0.148, 0.408, 0.674),
}


def _published_log(model: str) -> dict[str, Any]:
    paths = sorted(p for p in published("tofu").rglob("eval_log_aggregated.json") if model in str(p))
    if not paths:
        pytest.skip(f"no evaluation log of {model} below tofu/ in the folder of published data")
    return tofu_logs.read_log(paths[0])


@pytest.mark.parametrize("model", FIGURES)
def test_published_logs_give_the_published_figures(model: str):
    utility, arithmetic, probability, rouge, truth = FIGURES[model]
    found = tofu_logs.log_scores(_published_log(model))
    assert found.utility == pytest.approx(utility, abs=5e-5)
    assert tofu_logs.log_scores(_published_log(model), "arithmetic").utility == pytest.approx(
        arithmetic, abs=5e-5
    )
    forget = found.sets["forget"]
    assert [forget.probability, forget.rouge, forget.truth_ratio] == pytest.approx(
        [probability, rouge, truth], abs=5e-4
    )


def test_published_logs_give_the_published_forget_quality():
    full, retain = (_published_log(model) for model in FIGURES)
    found = tofu_logs.log_forget_quality(full, retain)
    assert found.n == 300
    assert found.p == pytest.approx(1.83e-21, rel=5e-3)
    assert found.statistic == pytest.approx(0.3967, abs=5e-5)
