"""Pictures of the feature space, and how far representations are from retrained ones, set by set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from palimpsest.audit.report import AuditReport
from palimpsest.report.gathering import GROUP, averaged, labels_of, requests_of, series
from palimpsest.report.style import PICKED, ROWS, choice, faded, specification

RETAINED = "retained"
GROUPS = ("#ee6677", "#4477aa", "#228833", "#aa3377", "#cc6633", "#33aadd", "#999933", "#7755cc")
"""Colours of the forgotten classes; retained records are gray."""
GRAY = "#8a8f98"
SIDE, COLUMNS = 240, 5
MEASURES = {
    "CKA to retrained": "cka_to_retrained",
    "CKA to original": "cka_to_original",
    "neighbours, features": "knn_features",
    "neighbours, logits": "knn_logits",
    "accuracy": "accuracy",
}


def features_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Forgotten and retained records in the plane of each model's features; of several seeds the first."""
    frame = series(reports, "features")
    if not len(frame):
        return None
    frame = _first_seeds(frame)
    groups = sorted(set(frame["group"]) - {RETAINED}, key=_by_number)
    scale = alt.Scale(
        domain=[RETAINED, *groups], range=[GRAY, *(GROUPS[i % len(GROUPS)] for i in range(len(groups)))]
    )
    labels = [label for label in labels_of(reports) if (frame["label"] == label).any()]
    points = alt.Chart(ROWS).mark_point(filled=True, size=16).encode(
        x=alt.X("x:Q", axis=None),
        y=alt.Y("y:Q", axis=None),
        color=alt.Color(
            "group:N", scale=scale,
            legend=alt.Legend(title=None, orient="top", columns=8, symbolOpacity=1, symbolSize=80),
        ),
        opacity=_opacity(),
        order=alt.Order("gone:Q"),
        tooltip=["label:N", "group:N", alt.Tooltip("share:Q", title="variance in the plane", format=".0%")],
    )  # fmt: skip
    header = alt.Header(title=None, labelFontSize=13, labelFontWeight=600)
    whole = points.properties(width=SIDE, height=SIDE).facet(
        facet=alt.Facet("label:N", sort=labels, header=header), columns=COLUMNS
    )
    rows = frame.assign(gone=(frame["group"] != RETAINED).astype(int))
    kept = rows[["request", "label", "group", "x", "y", "share", "gone"]]
    return specification(whole, kept.round({"x": 3, "y": 3, "share": 3}), requests_of(reports))


def sets_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Each measure of the representation by model and set, coloured by its gap to the retrained model."""
    frame = series(reports, "uuef")
    frame = frame[frame["model"] != "random"] if len(frame) else frame
    if not len(frame):
        return None
    rows = pd.concat([_measured(frame, title, field) for title, field in MEASURES.items()])
    titles = [title for title in MEASURES if (rows["measure"] == title).any()]
    names = [label for label in labels_of(reports) if (rows["label"] == label).any()]
    base = alt.Chart(ROWS).encode(
        x=alt.X("set:N", title=None, sort=list(dict.fromkeys(frame["set"])),
                axis=alt.Axis(orient="top", labelAngle=0, labelLimit=110)),
        y=alt.Y("label:N", title=None, sort=names, axis=alt.Axis(labelLimit=180)),
        opacity=faded(),
        tooltip=["label:N", "set:N", "measure:N", alt.Tooltip("mean:Q", title="value", format=".3f"),
                 alt.Tooltip("gap:Q", title="gap to retrained", format="+.3f"), "n:Q"],
    )  # fmt: skip
    scale = alt.Scale(
        domain=[-0.3, 0, 0.3], range=["#d6604d", "rgba(128,128,128,0.10)", "#4393c3"],
        interpolate="rgb", clamp=True,
    )  # fmt: skip
    squares = base.mark_rect(cornerRadius=2).encode(color=alt.Color("gap:Q", scale=scale, legend=None))
    numbers = base.mark_text(fontSize=11).encode(text=alt.Text("mean:Q", format=".2f"))
    width = max(280, min(560, 84 * frame["set"].nunique()))
    whole = alt.layer(squares, numbers).properties(width=width, height=alt.Step(26))
    menu = [choice("measure", titles, "measure ")]
    return specification(whole, rows, requests_of(reports), "datum.measure == measure", menu)


def _measured(frame: pd.DataFrame, title: str, field: str) -> pd.DataFrame:
    """Mean of a measure over seeds, and its mean gap."""
    if field not in frame:
        return pd.DataFrame()
    known = frame.assign(value=pd.to_numeric(frame[field]), gap=pd.to_numeric(frame[f"{field}_gap"]))
    rows = averaged(known, [*GROUP, "set"], "value")
    gaps = known.groupby([*GROUP, "set"], sort=False)["gap"].mean().reset_index()
    return rows.merge(gaps, on=[*GROUP, "set"], how="left").assign(measure=title)


def _first_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Of every request and subject the rows of its first seed: planes of several models do not fit together."""
    first = frame.groupby(GROUP, sort=False)["seed"].transform("first")
    return frame[frame["seed"] == first]


def _opacity() -> Any:
    """Retained records stand back; models that are not picked fade."""
    return {
        "condition": [
            {"test": f"({PICKED}) && datum.gone", "value": 0.9},
            {"test": PICKED, "value": 0.45},
        ],
        "value": 0.05,
    }


def _by_number(name: str) -> tuple[int, str]:
    last = name.rpartition(" ")[2]
    return (int(last) if last.isdigit() else -1, name)
