"""How all charts look, and how they are linked: one colour per subject, one focus, one request.

Every chart has two parameters that the page sets in all charts at once: `request`, the request that is
shown, and `focus`, the labels that were picked (none means all). Text and axes get their colour from the
page, in light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt
import pandas as pd

from palimpsest.report.gathering import ORIGINAL, RETRAINED

PALETTE = (
    "#4477aa", "#ee6677", "#228833", "#aa3377", "#33aadd", "#cc6633", "#7755cc", "#999933",
    "#44aa99", "#b05080", "#5588ff", "#88aa22", "#dd7799", "#337766", "#aa7744", "#8888cc",
)  # fmt: skip
"""Told apart by most colour-blind readers (after Paul Tol), and seen on white and on dark grey."""
ENDS = {ORIGINAL: "#8a8f98", RETRAINED: "#d49a00"}
WIDTH, HEIGHT = "container", 300
"""Charts fill the panel that they stand in; those with one row per model have a width of their own."""
ROWS_WIDTH = 430
FOLLOWED = "length(focus) && indexof(focus, datum.label) >= 0"
PICKED = "!length(focus) || indexof(focus, datum.label) >= 0"


ROWS = alt.NamedData("rows")
"""The one table of a chart; `specification` puts it in."""


def specification(
    chart: Any,
    rows: pd.DataFrame,
    requests: Sequence[str],
    where: str = "",
    choices: Sequence[alt.Parameter] = (),
    every_request: bool = False,
) -> dict[str, Any]:
    """A chart as Vega-Lite, with its table: shows one request at a time and listens to the focus.

    Args:
        chart: Over `ROWS`.
        rows: With at least request and label; numbers are cut to 6 digits, NaN becomes null.
        requests: All that there are.
        where: A further condition on rows.
        choices: Menus below the chart that `where` refers to.
        every_request: Whether rows are shown whichever request is picked (they need not name one).
    """
    picked = "" if every_request else "datum.request == request"
    condition = " && ".join(part for part in (picked, where) if part) or "true"
    shared = [alt.param(name="request", value=requests[0]), alt.param(name="focus", value=[])]
    # Altair checks every step as it is made; the table is put in last, so that it is not checked row by row.
    plain = chart.transform_filter(condition).add_params(*shared, *choices).to_dict(validate=False)
    shown = rows.map(lambda item: float(f"{item:.6g}") if isinstance(item, float) else item)
    table = shown.astype(object).where(shown.notna(), None).to_dict("records")
    return {**plain, "datasets": {**plain.get("datasets", {}), ROWS.name: table}}


def colours(labels: Iterable[str]) -> dict[str, str]:
    """One colour per subject, the same in every chart."""
    methods = [label for label in labels if label not in ENDS]
    return ENDS | {label: PALETTE[index % len(PALETTE)] for index, label in enumerate(methods)}


def colour(labels: Sequence[str]) -> alt.Color:
    """The colours of the subjects; the page has the legend."""
    own = colours(labels)
    return alt.Color(
        "label:N", scale=alt.Scale(domain=list(labels), range=[own[label] for label in labels]), legend=None
    )


def faded(shown: float = 1.0, hidden: float = 0.08) -> Any:
    """Opacity: full for what is picked."""
    return alt.condition(PICKED, alt.value(shown), alt.value(hidden))


def choice(name: str, options: Sequence[str], title: str) -> alt.Parameter:
    """A menu below a chart that picks one of several."""
    return alt.param(name=name, value=options[0], bind=alt.binding_select(options=list(options), name=title))
