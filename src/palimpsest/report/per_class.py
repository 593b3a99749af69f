"""Accuracy by class: what else was lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from palimpsest.audit.report import AuditReport
from palimpsest.report.gathering import GROUP, ORIGINAL, averaged, labels_of, requests_of, series
from palimpsest.report.style import ROWS, faded, specification

MOST_CLASSES = 40
"""With more classes only those whose accuracy changes most are drawn."""


def class_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Change of test accuracy against the original, class by class, mean over seeds."""
    changes = _changes(reports)
    if not len(changes):
        return None
    rows = averaged(changes, [*GROUP, "class"], "change")
    rows["points"] = (100 * rows["mean"]).round().astype(int)
    largest = rows.groupby("class")["mean"].apply(lambda column: column.abs().max())
    kept = [str(name) for name in largest.sort_values(ascending=False).index[:MOST_CLASSES]]
    rows = rows[rows["class"].isin(kept)]
    order = [label for label in labels_of(reports) if label != ORIGINAL]
    cells = alt.Chart(ROWS).encode(
        x=alt.X(
            "class:N", title="class", sort=_numbers_first(kept), axis=alt.Axis(labelAngle=0, labelLimit=90)
        ),
        y=alt.Y("label:N", title=None, sort=order, axis=alt.Axis(labelLimit=220)),
        opacity=faded(),
        tooltip=[
            alt.Tooltip("label:N", title="model"),
            alt.Tooltip("class:N"),
            alt.Tooltip("mean:Q", title="change of accuracy", format="+.3f"),
            alt.Tooltip("low:Q", format="+.3f"),
            alt.Tooltip("high:Q", format="+.3f"),
        ],
    )
    scale = alt.Scale(
        domain=[-1, 0, 1], range=["#d6604d", "rgba(128,128,128,0.10)", "#4393c3"], interpolate="rgb"
    )
    squares = cells.mark_rect(cornerRadius=2).encode(color=alt.Color("mean:Q", scale=scale, legend=None))
    numbers = cells.mark_text(fontSize=11).encode(text=alt.Text("points:Q", format="+d"))
    width = max(360, min(1080, 74 * len(kept)))
    whole = alt.layer(squares, numbers).properties(width=width, height=alt.Step(24))
    return specification(whole, rows, requests_of(reports))


def _changes(reports: Sequence[AuditReport]) -> pd.DataFrame:
    """Accuracy within a class minus the original's of the same seed; test records, else all others."""
    frame = series(reports, "per_class")
    if not len(frame):
        return frame
    if (frame["part"] == "test").any():
        frame = frame[frame["part"] == "test"]
    before = (
        frame[frame["label"] == ORIGINAL].groupby(["request", "class"])["accuracy"].mean().rename("before")
    )
    frame = frame[frame["label"] != ORIGINAL].merge(before.reset_index(), on=["request", "class"])
    return frame.assign(change=frame["accuracy"] - frame["before"])


def _numbers_first(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
