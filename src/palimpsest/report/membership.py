"""What an attacker tells from outputs: ROC curves, and the confidences that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from palimpsest.audit.report import AuditReport
from palimpsest.report.gathering import GROUP, averaged, labels_of, requests_of, series
from palimpsest.report.style import HEIGHT, ROWS, WIDTH, choice, colour, faded, specification

LOWEST = 1e-3
GUESSING = "guessing"
GRID = np.logspace(np.log10(LOWEST), 0, 37)
FORGET, HOLDOUT = "forget records", "records never seen (holdout)"


def roc_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """True against false positive rate, both logarithmic; the mean over seeds."""
    frame = series(reports, "roc")
    if not len(frame):
        return None
    curves = [
        pd.DataFrame({"request": request, "label": label, "attack": attack, "fpr": GRID,
                      "tpr": reached(group["fpr"].to_numpy(), group["tpr"].to_numpy())})
        for (request, label, attack, _), group in frame.groupby([*GROUP, "attack", "seed"], sort=False)
    ]  # fmt: skip
    rows = averaged(pd.concat(curves), [*GROUP, "attack", "fpr"], "tpr")
    rows["shown"] = rows["mean"].clip(lower=LOWEST)
    rows = rows[rows["mean"] > 0]
    log = alt.Scale(type="log", domain=[LOWEST, 1], clamp=True)
    axis = alt.Axis(values=[0.001, 0.01, 0.1, 1], format="~g")
    x = alt.X("fpr:Q", title="false positive rate", scale=log, axis=axis)
    y = alt.Y("shown:Q", title="true positive rate", scale=log, axis=axis)
    base = alt.Chart(ROWS).encode(x=x, y=y)
    guessing = base.transform_filter(f"datum.attack == '{GUESSING}'").mark_line(
        strokeDash=[4, 4], color="#888888", strokeWidth=1
    )
    lines = (
        base.transform_filter(f"datum.attack != '{GUESSING}'")
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            color=colour(labels_of(reports)),
            opacity=faded(),
            tooltip=[
                "label:N",
                alt.Tooltip("fpr:Q", title="false positives", format=".3g"),
                alt.Tooltip("mean:Q", title="true positives", format=".3f"),
            ],
        )
    )
    ends = pd.DataFrame(
        {"request": request, "attack": GUESSING, "fpr": rate, "shown": rate}
        for request in requests_of(reports)
        for rate in (LOWEST, 1.0)
    )
    attacks = list(dict.fromkeys(frame["attack"]))
    whole = alt.layer(guessing, lines).properties(width=WIDTH, height=HEIGHT)
    menus = [choice("attack", attacks, "attack ")]
    where = f"(datum.attack == attack || datum.attack == '{GUESSING}')"
    return specification(whole, pd.concat([rows, ends]), requests_of(reports), where, menus)


def reached(fpr: np.ndarray, tpr: np.ndarray) -> np.ndarray:
    """Largest true positive rate at a false positive rate of at most every point of `GRID`."""
    order = np.lexsort((tpr, fpr))
    best = np.maximum.accumulate(tpr[order])
    where = np.searchsorted(fpr[order], GRID, side="right") - 1
    return np.where(where >= 0, best[np.clip(where, 0, None)], 0.0)


def confidence_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """How sure the models are of the true label: forget records against records never seen."""
    frame = series(reports, "confidence")
    if not len(frame):
        return None
    rows = _mean_by_bin(frame)
    kinds = [FORGET, HOLDOUT]
    scale = alt.Scale(domain=kinds, range=["#ee6677", "#5b7fa6"])
    base = alt.Chart(ROWS).encode(
        x=alt.X("from:Q", title="probability of the true label", scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("share:Q", title="share of records"),
        color=alt.Color("part:N", scale=scale, legend=alt.Legend(title=None, orient="top", labelLimit=300)),
        tooltip=["label:N", "part:N", alt.Tooltip("share:Q", format=".3f")],
    )
    bars = (
        base.transform_filter(f"datum.part == '{FORGET}'")
        .mark_rect(opacity=0.65)
        .encode(x2="to:Q", y2=alt.Y2Datum(0))
    )
    steps = base.transform_filter(f"datum.part == '{HOLDOUT}'").mark_line(
        interpolate="step-after", strokeWidth=2
    )
    small = alt.layer(bars, steps).properties(width=180, height=110)
    title = alt.Header(title=None, labelFontWeight="bold")
    facet = small.facet(facet=alt.Facet("label:N", sort=labels_of(reports), header=title), columns=5)
    return specification(facet, rows, requests_of(reports))


def _mean_by_bin(frame: pd.DataFrame) -> pd.DataFrame:
    """Shares averaged over seeds, with the edges of the bins as `from` and `to`."""
    grouped = frame.groupby([*GROUP, "part", "low", "high"], sort=False)["share"].mean().reset_index()
    named = grouped.rename(columns={"low": "from", "high": "to"})
    return named.assign(part=named["part"].map({"forget": FORGET, "holdout": HOLDOUT}))
