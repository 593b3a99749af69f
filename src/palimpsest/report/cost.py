"""What a method costs, beside retraining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from palimpsest.audit.report import AuditReport
from palimpsest.report.gathering import GROUP, ORIGINAL, averaged, labels_of, requests_of, values
from palimpsest.report.style import ROWS, ROWS_WIDTH, colour, faded, specification


def cost_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Time as a share of retraining, with seconds beside the bars."""
    share = values(reports, "cost.share")
    share = share[share["label"] != ORIGINAL]
    if not len(share):
        return None
    rows = averaged(share, GROUP, "value")
    seconds = averaged(values(reports, "cost.seconds"), GROUP, "value")[[*GROUP, "mean"]]
    memory = values(reports, "cost.peak_mb")
    peak = averaged(memory, GROUP, "value")[[*GROUP, "mean"]] if len(memory) else seconds.assign(mean=None)
    rows = rows.merge(seconds.rename(columns={"mean": "seconds"}), on=GROUP, how="left")
    rows = rows.merge(peak.rename(columns={"mean": "mb"}), on=GROUP, how="left")
    rows["text"] = [f"{value:.2g} s" for value in rows["seconds"].fillna(0.0)]
    order = [label for label in labels_of(reports) if label != ORIGINAL]
    base = alt.Chart(ROWS).encode(
        y=alt.Y("label:N", title=None, sort=order, axis=alt.Axis(labelLimit=220)),
        opacity=faded(),
        tooltip=[
            "label:N",
            alt.Tooltip("mean:Q", title="share of retraining", format=".1%"),
            alt.Tooltip("seconds:Q", format=".3g"),
            alt.Tooltip("mb:Q", title="peak memory, MiB", format=".0f"),
        ],
    )
    title = "time as a share of retraining"
    x = alt.X("mean:Q", title=title, axis=alt.Axis(format="%"))
    bars = base.mark_bar(height=14, cornerRadiusEnd=2).encode(x=x, color=colour(labels_of(reports)))
    ranges = base.mark_rule(color="#888888").encode(x=alt.X("low:Q", title=title), x2="high:Q")
    words = base.mark_text(align="left", dx=6, fontSize=11).encode(x=alt.X("high:Q"), text="text:N")
    whole = alt.layer(bars, ranges, words).properties(width=ROWS_WIDTH, height=alt.Step(24))
    return specification(whole, rows, requests_of(reports))
