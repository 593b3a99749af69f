"""Requests in turn: what becomes of utility, and of what was forgotten earlier, from request to request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from palimpsest.audit.report import AuditReport
from palimpsest.report.gathering import averaged, label_of, labels_of, requests_of
from palimpsest.report.style import HEIGHT, ROWS, WIDTH, choice, colour, faded, specification

TEST, FORGET = ("utility.test_accuracy", "recall.test_hit"), ("utility.forget_accuracy", "recall.forget_hit")
"""Findings of utility and of what is forgotten, of classifiers and of language models."""
UTILITY, IN_TIME, AT_THE_END = "test accuracy", "K right after the request", "K after the last request"


def turns_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Test accuracy after every request, and knowledge K of each request's records at their time and at the end."""
    if not any(report.facts.get("step", 0) > 0 for report in reports):
        return None
    order = {
        report.facts["request"]: report.facts["step"] + 1
        for report in reports
        if not report.facts.get("review")
    }
    rows: list[dict[str, object]] = []
    for report in reports:
        request, review = str(report.facts["request"]), bool(report.facts.get("review"))
        about = {"label": label_of(report), "step": order[request.removesuffix(", at the end")]}
        found = {item.key: item for item in report.findings}
        test, forget = (next((found[key] for key in keys if key in found), None) for keys in (TEST, FORGET))
        if test is not None and not review:
            rows.append({**about, "shown": UTILITY, "value": test.value})
        if forget is not None and forget.k is not None:
            rows.append({**about, "shown": AT_THE_END if review else IN_TIME, "value": forget.k})
            if not review and about["step"] == len(order):
                rows.append({**about, "shown": AT_THE_END, "value": forget.k})
    if not rows:  # no plain questions, no accuracy: a study of another domain
        return None
    frame = pd.DataFrame(rows, columns=pd.Index(["label", "step", "shown", "value"]))
    means = averaged(frame.dropna(), ["label", "step", "shown"], "value")
    present = [shown for shown in (UTILITY, IN_TIME, AT_THE_END) if (means["shown"] == shown).any()]
    menu = choice("shown", present, "show ")
    base = alt.Chart(ROWS).encode(
        x=alt.X("step:O", title="request", axis=alt.Axis(labelAngle=0)), color=colour(labels_of(reports))
    )
    fine = alt.Scale(zero=False, padding=8)
    bars = base.mark_rule().encode(y=alt.Y("low:Q", title=None), y2="high:Q", opacity=faded(0.5, 0.04))
    lines = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=36)).encode(
        y=alt.Y("mean:Q", title="mean over seeds", scale=fine),
        opacity=faded(),
        tooltip=["label:N", "step:O", alt.Tooltip("mean:Q", title="mean", format=".3f"), "n:Q"],
    )
    layers = alt.layer(bars, lines).properties(width=WIDTH, height=HEIGHT)
    return specification(
        layers, means, requests_of(reports), f"datum.shown == {menu.name}", [menu], every_request=True
    )
