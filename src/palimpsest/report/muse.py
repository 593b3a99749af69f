"""MUSE over several requests: scalability as forget sets grow, sustainability as requests follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from palimpsest.audit.report import AuditReport
from palimpsest.report.gathering import averaged, label_of, labels_of, request_of, requests_of
from palimpsest.report.style import HEIGHT, ROWS, WIDTH, choice, colour, faded, specification

SHOWN = {
    "muse.knowmem_retain": "utility (KnowMem on retained data)",
    "muse.knowmem_forget": "KnowMem on the forget data",
    "muse.verbmem": "VerbMem on the forget data",
    "muse.privacy_leak": "PrivLeak",
}
"""What is drawn, by finding."""


def muse_rows(reports: Sequence[AuditReport]) -> pd.DataFrame:
    """Every score of every subject after every request: label, step (from 1), shown, value; one row per seed.

    Requests that are audited once more at the end of a sequence are left out.
    """
    mine = [report for report in reports if not report.facts.get("review")]
    order = {request: number for number, request in enumerate(requests_of(mine), 1)}
    rows = [
        {
            "label": label_of(report),
            "step": order[request_of(report)],
            "shown": SHOWN[item.key],
            "value": item.value,
        }
        for report in mine
        for item in report.findings
        if item.key in SHOWN and item.value is not None
    ]
    return pd.DataFrame(rows, columns=pd.Index(["label", "step", "shown", "value"]))


def muse_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """The scores as curves over the requests; None for a single request, or without MUSE's audit."""
    rows = muse_rows(reports)
    if rows.empty or rows["step"].nunique() < 2:
        return None
    means = averaged(rows, ["label", "step", "shown"], "value")
    present = [shown for shown in SHOWN.values() if (means["shown"] == shown).any()]
    menu = choice("muse", present, "show ")
    base = alt.Chart(ROWS).encode(
        x=alt.X("step:O", title="request", axis=alt.Axis(labelAngle=0)), color=colour(labels_of(reports))
    )
    bars = base.mark_rule().encode(y=alt.Y("low:Q", title=None), y2="high:Q", opacity=faded(0.5, 0.04))
    lines = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=36)).encode(
        y=alt.Y("mean:Q", title="mean over seeds", scale=alt.Scale(zero=False, padding=8)),
        opacity=faded(),
        tooltip=["label:N", "step:O", alt.Tooltip("mean:Q", title="mean", format=".1f"), "n:Q"],
    )
    layers = alt.layer(bars, lines).properties(width=WIDTH, height=HEIGHT)
    return specification(
        layers, means, requests_of(reports), f"datum.shown == {menu.name}", [menu], every_request=True
    )
