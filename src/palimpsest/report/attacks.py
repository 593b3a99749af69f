"""Does it come back? Accuracy on the forget records while a model is attacked, the same for all models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from palimpsest.audit.report import AuditReport
from palimpsest.report.gathering import GROUP, averaged, labels_of, requests_of, series
from palimpsest.report.style import HEIGHT, ROWS, WIDTH, choice, colour, faded, specification

TITLES = {
    "forget-few": "a few forget records",
    "forget-fraction": "a part of the forget records",
    "benign": "retained records only",
    "unrelated": "unrelated texts",
    "later": "new facts",
}
ACCURACY = "accuracy on the forget records"


def relearning_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Accuracy after every step of training on some forget records, or on retained records only."""
    frame = series(reports, "relearning")
    if not len(frame):
        return None
    frame = frame.assign(trained=[TITLES.get(str(attack), str(attack)) for attack in frame["attack"]])
    menu = choice("trained", list(dict.fromkeys(frame["trained"])), "trained on ")
    return _curves(frame, "step", "accuracy", "step of training", reports, menu)


def quantization_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Accuracy with weights of fewer bits."""
    frame = series(reports, "quantization")
    return _steps(frame, "format", "bits", "forget_accuracy", "weights", reports) if len(frame) else None


def pruning_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Accuracy with the smallest weights removed."""
    frame = series(reports, "pruning")
    return (
        _curves(frame, "share", "forget_accuracy", "share of weights removed", reports)
        if len(frame)
        else None
    )


def interpolation_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Accuracy on the straight line of weights to the original."""
    frame = series(reports, "interpolation")
    if not len(frame):
        return None
    return _curves(frame, "a", "forget_accuracy", "share of the original's weights mixed in", reports)


def _curves(
    frame: pd.DataFrame,
    x: str,
    y: str,
    title: str,
    reports: Sequence[AuditReport],
    menu: alt.Parameter | None = None,
) -> dict[str, Any]:
    fields = [] if menu is None else [str(menu.name)]
    rows = averaged(frame, [*GROUP, *fields, x], y)
    base = alt.Chart(ROWS).encode(x=alt.X(f"{x}:Q", title=title), color=colour(labels_of(reports)))
    band = base.mark_area(opacity=0.12).encode(
        y=alt.Y("low:Q", title=ACCURACY), y2="high:Q", opacity=faded(0.09, 0.0)
    )
    where = " && ".join(f"datum.{field} == {field}" for field in fields)
    return specification(
        _lines(band, base), rows, requests_of(reports), where, [] if menu is None else [menu]
    )


def _steps(
    frame: pd.DataFrame, x: str, order: str, y: str, title: str, reports: Sequence[AuditReport]
) -> dict[str, Any]:
    """As `_curves`, over named formats from the most to the fewest bits."""
    rows = averaged(frame, [*GROUP, x, order], y)
    sort = alt.EncodingSortField(order, op="max", order="descending")
    base = alt.Chart(ROWS).encode(
        x=alt.X(f"{x}:N", title=title, sort=sort, axis=alt.Axis(labelAngle=0)),
        color=colour(labels_of(reports)),
    )
    bars = base.mark_rule().encode(y=alt.Y("low:Q", title=ACCURACY), y2="high:Q", opacity=faded(0.5, 0.04))
    return specification(_lines(bars, base), rows, requests_of(reports))


def _lines(below: alt.Chart, base: alt.Chart) -> Any:
    lines = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=30)).encode(
        y=alt.Y("mean:Q", title=ACCURACY, scale=alt.Scale(domain=[0, 1], clamp=True)),
        opacity=faded(),
        tooltip=["label:N", alt.Tooltip("mean:Q", title=ACCURACY, format=".3f")],
    )
    return alt.layer(below, lines).properties(width=WIDTH, height=HEIGHT)
