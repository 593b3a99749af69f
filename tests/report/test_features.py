"""The picture of the feature space and the table of sets, as data."""

from __future__ import annotations

import altair as alt
import pandas as pd
import pytest

from palimpsest.report.features import MEASURES, features_chart, sets_chart
from palimpsest.report.gathering import series


def rows_of(spec) -> pd.DataFrame:
    return pd.DataFrame(spec["datasets"]["rows"])


def test_every_model_has_a_picture_of_one_seed_with_the_forgotten_class_in_colour(study):
    spec = features_chart(study.reports)
    alt.Chart.from_dict(spec)
    rows = rows_of(spec)
    mine = rows[rows["request"] == "label = 3"]
    assert set(mine["label"]) == {"original", "retrained", "ssd", "finetune (epochs=1)"}
    assert (mine.groupby(["label", "group"]).size() == 40).all(), "the rows of a single seed"
    assert set(mine["group"]) == {"retained", "class 3"}
    others = rows[rows["request"] != "label = 3"]
    assert set(others["group"]) == {"retained", "forgotten"}


def test_the_original_is_drawn_where_a_method_that_changed_nothing_lies(study):
    alone = [
        r for r in study.reports if r.facts["label"] == "original" and r.facts["request"] == "label = 3"
    ][:1]
    frame = pd.DataFrame(alone[0].series["features"])
    points = [frame[frame["model"] == model][["x", "y"]].to_numpy() for model in ("original", "unlearned")]
    assert points[0] == pytest.approx(points[1])


def test_the_table_by_set_holds_means_over_seeds_and_their_gaps(study):
    spec = sets_chart(study.reports)
    alt.Chart.from_dict(spec)
    rows = rows_of(spec)
    assert set(rows["measure"]) == set(MEASURES)
    frame = series(study.reports, "uuef")
    mine = frame[(frame["label"] == "ssd") & (frame["request"] == "label = 3") & (frame["set"] == "retain")]
    shown = rows[
        (rows["label"] == "ssd") & (rows["request"] == "label = 3") & (rows["set"] == "retain")
        & (rows["measure"] == "neighbours, features")
    ].iloc[0]  # fmt: skip
    assert shown["mean"] == pytest.approx(mine["knn_features"].astype(float).mean(), abs=1e-5)
    assert shown["gap"] == pytest.approx(mine["knn_features_gap"].astype(float).mean(), abs=1e-5)
    assert "held out" in set(rows["set"])
    assert not ((rows["set"] == "held out") & (rows["measure"] == "accuracy")).any()
    assert "random" not in set(rows["label"])


def test_a_single_audit_draws_its_own_models_and_reports_without_the_audit_draw_nothing(study):
    only = [report for report in study.reports if report.facts["label"] == "ssd"][:1]
    assert set(rows_of(features_chart(only))["label"]) == {"original", "retrained", "ssd"}
    assert set(rows_of(sets_chart(only))["label"]) == {"original", "retrained", "ssd"}
    from dataclasses import replace

    bare = [replace(only[0], series={})]
    assert features_chart(bare) is None and sets_chart(bare) is None
