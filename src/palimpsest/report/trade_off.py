"""The trade-off: what is forgotten, what is still known, what an attacker can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from palimpsest.audit.report import AuditReport
from palimpsest.report.gathering import GROUP, ORIGINAL, RETRAINED, averaged, labels_of, requests_of, values
from palimpsest.report.style import FOLLOWED, HEIGHT, ROWS, WIDTH, colour, faded, specification

FORGETTING = {
    "utility.forget_accuracy": "accuracy on the forget records",
    "recall.forget_hit": "share of forgotten facts that are named",
    "regression.forget_mae": "mean absolute error on the forget records",
}
UTILITY = {
    "utility.test_accuracy": "accuracy on test records",
    "utility.retain_accuracy": "accuracy on the retained records",
    "recall.test_hit": "share of test questions that are answered",
    "recall.retain_hit": "share of retained questions that are answered",
    "regression.test_mae": "mean absolute error on test records",
    "regression.retain_mae": "mean absolute error on the retained records",
}
PRIVACY = {
    "membership.loss_auc": "membership attack on the forget records, AUC (0.5: cannot tell)",
    "text-membership.loss_auc": "membership attack on the forget texts, AUC (0.5: cannot tell)",
    "regression.membership": "share of forget records that an attack calls members",
}


def forgetting_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Forgetting against utility."""
    return _scatter(reports, FORGETTING)


def privacy_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Privacy against utility."""
    return _scatter(reports, PRIVACY)


def _scatter(reports: Sequence[AuditReport], across: dict[str, str]) -> dict[str, Any] | None:
    """Means with 95 % intervals over seeds; the retrained model is the star."""
    x, x_title = _first(reports, across)
    y, y_title = _first(reports, UTILITY)
    if x is None or y is None:
        return None
    points = x.merge(y, on=GROUP, suffixes=("_x", "_y"))
    points["star"] = points["label"] == RETRAINED
    fine = alt.Scale(zero=False, padding=12)
    base = alt.Chart(ROWS).encode(color=colour(labels_of(reports)), opacity=faded())
    horizontal, vertical = (
        alt.X("mean_x:Q", title=x_title, scale=fine),
        alt.Y("mean_y:Q", title=y_title, scale=fine),
    )
    across_bars = base.mark_rule(strokeWidth=1.5).encode(
        x=alt.X("low_x:Q", title=x_title), x2="high_x:Q", y=vertical
    )
    upright_bars = base.mark_rule(strokeWidth=1.5).encode(
        x=horizontal, y=alt.Y("low_y:Q", title=y_title), y2="high_y:Q"
    )
    dots = base.mark_point(filled=True, size=110, stroke=None).transform_filter("!datum.star")
    star = base.mark_point(filled=True, size=340, shape=STAR, strokeWidth=1).transform_filter("datum.star")
    names = base.mark_text(dy=-16, fontSize=12, fontWeight=600).encode(
        x=horizontal, y=vertical, text="label:N", opacity=alt.condition(NAMED, alt.value(1), alt.value(0))
    )
    tooltip = [
        alt.Tooltip("label:N", title="model"),
        alt.Tooltip("mean_x:Q", title=x_title, format=".3f"),
        alt.Tooltip("mean_y:Q", title=y_title, format=".3f"),
        alt.Tooltip("n_x:Q", title="seeds"),
    ]
    marks = [mark.encode(x=horizontal, y=vertical, tooltip=tooltip) for mark in (dots, star)]
    layers = alt.layer(across_bars, upright_bars, *marks, names).properties(width=WIDTH, height=HEIGHT + 20)
    return specification(layers, points, requests_of(reports))


NAMED = f"({FOLLOWED}) || (!length(focus) && (datum.label == '{RETRAINED}' || datum.label == '{ORIGINAL}'))"
"""Names of the two ends, or of what was picked: all at once they would cover each other."""
STAR = "M0,-1L0.235,-0.324L0.951,-0.309L0.380,0.124L0.588,0.809L0,0.4L-0.588,0.809L-0.380,0.124L-0.951,-0.309L-0.235,-0.324Z"


def _first(reports: Sequence[AuditReport], candidates: dict[str, str]) -> tuple[pd.DataFrame | None, str]:
    """The first finding that was measured, averaged over seeds, and its title."""
    for key, title in candidates.items():
        found = values(reports, key)
        if len(found):
            means = averaged(found, GROUP, "value")
            if found["value"].between(0, 1).all():  # a rate: so is every end of its interval
                means[["low", "high"]] = means[["low", "high"]].clip(0, 1)
            return means, title
    return None, ""
