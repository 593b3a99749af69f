"""Heat maps of causal tracing: where in a model a fact lies, by layer and group of tokens."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from palimpsest.core.rendering import chart
from palimpsest.parts.causal_tracing import GROUPS
from palimpsest.tasks.tracing import Tracing

WORDS = {
    "before": "before the subject",
    "first subject": "first subject token",
    "middle subject": "middle subject tokens",
    "last subject": "last subject token",
    "further": "after the subject",
    "last": "last token",
}
"""Groups of tokens, in the order of a prompt."""
PANELS = {"state": "one block's output", "mlp": "MLPs", "attention": "attentions"}
CELL, WIDEST = 30, 420
"""Pixels: side of a cell, and of a panel at most."""
MARK = "#ee6677"
"""Outline of the layers that were chosen."""


@chart("tracing")
def tracing_chart(tracing: Tracing) -> Any:
    """One heat map per kind of state that was restored, on one scale of colours.

    The colour is the mean probability of the answer that restoring brings back; the chosen layers are outlined.
    """
    frame = pd.DataFrame(tracing.rows())
    frame["tokens"] = frame["group"].map(WORDS)
    present = [WORDS[group] for group in GROUPS if WORDS[group] in set(frame["tokens"])]
    span = [min(0.0, float(frame["effect"].min())), max(float(frame["effect"].max()), 1e-3)]
    panels = [_panel(tracing, frame[frame["kind"] == kind], kind, present, span) for kind in tracing.kinds]
    skipped = f", {len(tracing.skipped)} not known and skipped" if tracing.skipped else ""
    subtitle = [
        f"Mean over {len(tracing.ids)} facts{skipped}: probability {tracing.high:.2f} of the answer, {tracing.low:.2f} "
        "with noise on the subject.",
        f"Outlined: {_span(tracing.layers)} of 0 to {tracing.depth - 1}.",
    ]
    title = alt.TitleParams(
        "What brings the answer back", subtitle=subtitle, anchor="start", subtitleColor="#666666", offset=14
    )
    whole = alt.hconcat(*panels, title=title, spacing=18)
    return whole.configure_view(strokeWidth=0).configure(font="system-ui, sans-serif")


def _panel(tracing: Tracing, frame: pd.DataFrame, kind: str, groups: list[str], span: list[float]) -> Any:
    first = kind == tracing.kinds[0]
    window = f" (windows of {tracing.window} layers)" if kind != "state" and tracing.window > 1 else ""
    base = alt.Chart(frame).encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("tokens:N", sort=groups, title=None, scale=alt.Scale(domain=groups),
                axis=alt.Axis(labelLimit=240) if first else None),
        tooltip=["tokens:N", "layer:O", alt.Tooltip("effect:Q", title="indirect effect", format=".4f")],
    )  # fmt: skip
    cells = base.mark_rect(stroke="#ffffff", strokeWidth=0.5).encode(
        color=alt.Color("effect:Q", title="effect", scale=alt.Scale(scheme="viridis", domain=span))
    )  # fmt: skip
    outline = base.transform_filter("datum.chosen").mark_rect(filled=False, stroke=MARK, strokeWidth=3)
    size = {"width": min(WIDEST, max(4, tracing.depth) * CELL), "height": len(groups) * CELL}
    return alt.layer(cells, outline).properties(title=f"{PANELS[kind]}{window}", **size)


def _span(layers: tuple[int, ...]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
