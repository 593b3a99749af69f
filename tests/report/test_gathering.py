"""Frames behind the charts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from palimpsest.report.gathering import averaged, half_width, series, values
from palimpsest.report.membership import GRID, reached


def test_intervals_are_students_and_a_single_value_has_none():
    sample = np.array([0.2, 0.5, 0.9])
    low, high = stats.t.interval(0.95, 2, loc=sample.mean(), scale=stats.sem(sample))
    frame = pd.DataFrame({"label": ["a"] * 3 + ["b"], "x": [*sample, 0.4]})
    rows = averaged(frame, ["label"], "x").set_index("label")
    assert rows.loc["a", ["mean", "low", "high", "n"]].tolist() == pytest.approx(
        [sample.mean(), low, high, 3]
    )
    assert rows.loc["b", ["mean", "low", "high", "n"]].tolist() == pytest.approx([0.4, 0.4, 0.4, 1])
    assert half_width(np.array([np.nan]), np.array([1])).tolist() == [0.0]


def test_missing_values_are_left_out():
    frame = pd.DataFrame({"label": ["a", "a", "b"], "x": [1.0, None, None]})
    assert averaged(frame, ["label"], "x")[["label", "mean", "n"]].values.tolist() == [["a", 1.0, 1]]


def test_each_end_of_the_scale_counts_once_per_seed(study):
    found = values(study.reports, "utility.forget_accuracy")
    counts = found[found["request"] == "label = 3"].groupby("label").size()
    assert counts.to_dict() == {"original": 2, "retrained": 2, "ssd": 2, "finetune (epochs=1)": 2}
    methods = [report for report in study.reports if report.facts["label"] == "ssd"]
    alone = values(methods, "utility.forget_accuracy")
    counts = alone[alone["request"] == "label = 3"].groupby("label").size()
    assert counts.to_dict() == {"original": 2, "retrained": 2, "ssd": 2}, "two seeds, two controls"


def test_rows_of_a_subject_are_not_repeated_by_the_reports_of_others(study):
    frame = series(study.reports, "per_class")
    assert not frame.duplicated(["request", "label", "seed", "part", "class"]).any()
    assert set(frame["label"]) == {"original", "retrained", "ssd", "finetune (epochs=1)"}


def test_two_audits_that_draw_into_one_chart_both_arrive(study):
    assert set(series(study.reports, "relearning")["attack"]) == {"forget-few", "benign"}


def test_the_rate_reached_is_the_largest_allowed():
    random = np.random.default_rng(0)
    fpr, tpr = np.sort(random.random(30)), np.sort(random.random(30))
    brute = [max((t for f, t in zip(fpr, tpr, strict=True) if f <= limit), default=0.0) for limit in GRID]
    assert reached(fpr, tpr).tolist() == brute
