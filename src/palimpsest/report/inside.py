"""What is left inside, layer by layer: similarity to the original, a forgotten class apart, answers still readable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from palimpsest.audit.report import AuditReport
from palimpsest.report.gathering import GROUP, averaged, labels_of, requests_of, series
from palimpsest.report.style import HEIGHT, ROWS, WIDTH, choice, colour, faded, specification


def cka_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Linear CKA by layer, mean over seeds."""
    frame = series(reports, "cka")
    if not len(frame):
        return None
    frame = frame.assign(against=frame["against"].replace({"control": "a retrained model"}))
    partners, parts = list(dict.fromkeys(frame["against"])), list(dict.fromkeys(frame["part"]))
    menus = [choice("against", partners, "compared with "), choice("part", parts, "records ")]
    return _by_layer(frame, "cka", "linear CKA", reports, ["against", "part"], menus)


def separation_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """Separation of a class that was forgotten as a whole from the retained classes, by layer."""
    frame = series(reports, "separation")
    return _by_layer(frame, "separation", "separation of the class", reports) if len(frame) else None


def answers_chart(reports: Sequence[AuditReport]) -> dict[str, Any] | None:
    """How well the erased answers of a language model can be read off its hidden states, block by block."""
    lens, probes = series(reports, "lens"), series(reports, "probes")
    parts: list[pd.DataFrame] = []
    if len(probes):
        parts.append(probes.assign(read="by a probe, " + probes["probe"], value=probes["accuracy"]))
    if len(lens):
        parts.append(lens.assign(read="by the head " + lens["head"], value=lens["probability"]))
    if not parts:
        return None
    columns = [*GROUP, "seed", "block", "read", "value"]
    frame = pd.concat([part[columns] for part in parts])
    frame = frame.assign(layer="block " + frame["block"].astype(str), order=frame["block"])
    menu = choice("read", list(dict.fromkeys(frame["read"])), "read ")
    return _by_layer(frame, "value", "accuracy of the probe, or probability", reports, ["read"], [menu])


def _by_layer(
    frame: pd.DataFrame,
    value: str,
    title: str,
    reports: Sequence[AuditReport],
    fields: Sequence[str] = (),
    menus: Sequence[alt.Parameter] = (),
) -> dict[str, Any]:
    rows = averaged(frame, [*GROUP, *fields, "layer", "order"], value)
    base = alt.Chart(ROWS).encode(
        x=alt.X("layer:N", title="layer, from the input to the output",
                sort=alt.EncodingSortField("order", op="min"), axis=alt.Axis(labelAngle=-30)),
        color=colour(labels_of(reports)),
    )  # fmt: skip
    y = alt.Y("mean:Q", title=title, scale=alt.Scale(zero=False))
    tooltip = ["label:N", "layer:N", alt.Tooltip("mean:Q", title=title, format=".3f")]
    lines = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=36)).encode(
        y=y, opacity=faded(), tooltip=tooltip
    )
    bars = base.mark_rule(strokeWidth=1.2).encode(
        y=alt.Y("low:Q", title=title), y2="high:Q", opacity=faded(0.5, 0.04)
    )
    whole = alt.layer(bars, lines).properties(width=WIDTH, height=HEIGHT)
    where = " && ".join(f"datum.{field} == {field}" for field in fields)
    return specification(whole, rows, requests_of(reports), where, menus)
