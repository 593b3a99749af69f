"""Scores of TOFU against closed forms, and its published figures where the logs are at hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palimpsest.core.errors import InvalidAudit, InvalidRecords
from palimpsest.suites import tofu_logs, tofu_scores
from palimpsest.suites.tofu_scores import SetLosses, SetScores
from tests.suites.published import published


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


def test_the_probability_of_a_set_with_options_is_a_share():
    set_losses = SetLosses(
        ("0",), np.array([0.0]), np.array([0.0]), np.array([[math.log(2)] * 2]), np.ones(1)
    )
    assert tofu_scores.set_scores("world_facts", set_losses).probability == pytest.approx(0.5)
    assert tofu_scores.set_scores("retain", set_losses).probability == 1


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
