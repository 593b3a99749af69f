"""The page of a study of continual learning: accuracy matrices, curves while learning, forgetting, cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from palimpsest.core.errors import InvalidAudit
from palimpsest.core.writing import write_text
from palimpsest.report.frame import framed
from palimpsest.report.gathering import averaged
from palimpsest.report.style import (
    HEIGHT,
    ROWS,
    ROWS_WIDTH,
    WIDTH,
    choice,
    colour,
    colours,
    faded,
    specification,
)
from palimpsest.retain.metrics import accuracy_interval
from palimpsest.study.retain.result import PERCENT, SHOWN, RetainResult, shown

BINS = 240
"""Points of a curve; each shows the lowest accuracy of its stretch, so that no short drop is lost."""


@dataclass(frozen=True)
class Panel:
    """A chart of the page.

    Attributes:
        key: Of the element.
        title: Above it.
        reading: How to read it, in a sentence.
        make: From a result to a Vega-Lite specification, or None where there is nothing to draw.
        wide: Whether it takes the whole width.
    """

    key: str
    title: str
    reading: str
    make: Callable[[RetainResult], dict[str, Any] | None]
    wide: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    stream: str
    label: str
    cells: tuple[str, ...]


def write_retain_report(result: RetainResult, path: str | Path) -> Path:
    """Write the page, whole or not at all.

    Raises:
        InvalidAudit: If no cell is done.
        CannotWrite: If the place cannot be written.
    """
    return write_text(path, retain_html(result))


def retain_html(result: RetainResult) -> str:
    """The text of the page.

    Raises:
        InvalidAudit: If no cell is done.
    """
    if not result.done:
        raise InvalidAudit("No cell of the study is done: there is nothing to show.")
    drawn = [(panel, chart) for panel in PANELS if (chart := panel.make(result)) is not None]
    labels, streams = labels_of(result), streams_of(result)
    names = [name for name in SHOWN if any(name in row.measures for row in result.summary())]
    rows = [
        Row(
            item.stream,
            item.label,
            tuple(shown(name, item.measures.get(name), item.sampling.get(name)) for name in names),
        )
        for item in result.summary()
    ]
    data = {
        "requests": streams,
        "colours": colours(labels),
        "charts": {panel.key: chart for panel, chart in drawn},
        "findings": [],
    }
    seeds = sorted({cell.seed for cell in result.done})
    facts = [
        ("seeds", ", ".join(map(str, seeds))),
        ("methods", str(len(labels))),
        ("runs", str(len(result.done))),
    ]
    return framed(
        "retain.html", data, title=result.name, facts=facts, requests=streams, labels=labels,
        colours=data["colours"], rows=rows, headings=[SHOWN[name] for name in names], failures=result.failed,
        panels=[panel for panel, _ in drawn],
    )  # fmt: skip


def labels_of(result: RetainResult) -> list[str]:
    """Methods in the order of the recipe."""
    return list(dict.fromkeys(cell.label for cell in result.done))


def streams_of(result: RetainResult) -> list[str]:
    """Streams in the order of the recipe."""
    return list(dict.fromkeys(cell.stream for cell in result.done))


def matrix_frame(result: RetainResult) -> pd.DataFrame:
    """Accuracy of each task after each experience: request, label, seed, step, task, value."""
    rows = [
        {"request": cell.stream, "label": cell.label, "seed": cell.seed, "step": step + 1, "task": task + 1, "value": value}
        for cell in result.done
        for step, row in enumerate(cell.outcome["matrix"])
        for task, value in enumerate(row)
        if value is not None
    ]  # fmt: skip
    return pd.DataFrame(rows)


def matrix_chart(result: RetainResult) -> dict[str, Any] | None:
    """A heat map per method: accuracy on every task after every experience."""
    means = averaged(matrix_frame(result), ["request", "label", "step", "task"], "value")
    means["text"] = [f"{100 * value:.0f}" for value in means["mean"]]
    base = alt.Chart(ROWS).encode(
        x=alt.X("task:O", title="task", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("step:O", title="after experience"),
        tooltip=["label:N", "step:O", "task:O", alt.Tooltip("mean:Q", format=".3f"), "n:Q"],
    )
    boxes = base.mark_rect().encode(
        color=alt.Color("mean:Q", title="accuracy", scale=alt.Scale(scheme="viridis", domain=[0, 1])),
        opacity=faded(1.0, 0.25),
    )
    words = base.mark_text(fontSize=11).encode(
        text="text:N", color=alt.condition("datum.mean > 0.6", alt.value("#111111"), alt.value("#ffffff"))
    )
    side = 170 if int(means["task"].max()) <= 6 else 260
    facets = (
        alt.layer(boxes, words)
        .properties(width=side, height=side)
        .facet(
            facet=alt.Facet("label:N", title=None, sort=labels_of(result)), columns=6 if side == 170 else 4
        )
    )
    return specification(facets, means, streams_of(result))


def over_time_chart(result: RetainResult) -> dict[str, Any] | None:
    """Accuracy on each task, and the mean over tasks met, after every experience."""
    frame = matrix_frame(result)
    met = frame[frame["task"] <= frame["step"]]
    overall = met.groupby(["request", "label", "seed", "step"], sort=False)["value"].mean().reset_index()
    frame = pd.concat([
        overall.assign(shown="mean of the tasks met"),
        frame.assign(shown=[f"task {task}" for task in frame["task"]]),
    ])  # fmt: skip
    means = averaged(frame, ["request", "label", "step", "shown"], "value")
    return _lines(result, means, "step:O", "after experience", ["mean of the tasks met", *_tasks(frame)])


def curve_frame(result: RetainResult) -> pd.DataFrame:
    """Accuracy of earlier tasks while others are learned: the mean over them, and each."""
    rows: list[dict[str, object]] = []
    for cell in result.done:
        history = cell.outcome["history"]
        last, sizes = max(history["steps"], default=0), history["sizes"]
        for step, now, row in zip(history["steps"], history["learning"], history["accuracy"], strict=True):
            about = {"request": cell.stream, "label": cell.label, "seed": cell.seed, "last": last, "at": step}
            if now:
                rows.append(
                    {
                        **about,
                        "shown": "mean of the earlier tasks",
                        "value": float(np.mean(row[:now])),
                        "size": sum(sizes[:now]),
                    }
                )
            rows += [
                {**about, "shown": f"task {task + 1}", "value": value, "size": sizes[task]}
                for task, value in enumerate(row)
            ]
    return pd.DataFrame(rows)


def curves_chart(result: RetainResult) -> dict[str, Any] | None:
    """The stability gap: accuracy step by step, the lowest value of every stretch of steps.

    Bands are the wider of two 95 % intervals: over seeds, and of an accuracy on so many records in all.
    """
    frame = curve_frame(result)
    if not len(frame):
        return None
    width = np.maximum(1, -(-frame["last"] // BINS))
    frame["step"] = (frame["at"] // width) * width
    own = ["request", "label", "shown", "step"]
    lowest = frame.groupby([*own, "seed"], sort=False)["value"].min().reset_index()
    sizes = frame.groupby([*own, "seed"], sort=False)["size"].min().groupby(own, sort=False).sum()
    means = averaged(lowest, own, "value").merge(sizes.reset_index(), on=own, how="left")
    drawn = [
        accuracy_interval(value, int(size)) for value, size in zip(means["mean"], means["size"], strict=True)
    ]
    means["low"] = np.minimum(means["low"], [low for low, _ in drawn])
    means["high"] = np.maximum(means["high"], [high for _, high in drawn])
    means = means.drop(columns="size")
    return _lines(
        result, means, "step:Q", "optimiser steps", ["mean of the earlier tasks", *_tasks(frame)], False
    )


def gradient_frame(result: RetainResult) -> pd.DataFrame:
    """Norms of both parts of the gradient at every step that has both."""
    rows = [
        {
            "request": cell.stream, "label": cell.label, "seed": cell.seed, "step": step, "cosine": cosine,
            "plasticity": new, "stability": held,
        }
        for cell in result.done
        if (noted := cell.outcome.get("gradients"))
        for step, new, held, cosine in zip(
            noted["steps"], noted["plasticity"], noted["stability"], noted["cosine"], strict=True
        )
    ]  # fmt: skip
    return pd.DataFrame(rows)


def gradients_chart(result: RetainResult) -> dict[str, Any] | None:
    """What pulls at the weights, step by step: the gradient of new records, and what holds on to old ones."""
    frame = gradient_frame(result)
    if not len(frame):
        return None
    width = max(1, -(-int(frame["step"].max()) // BINS))
    frame["step"] = (frame["step"] // width) * width
    parts = frame.melt(["request", "label", "seed", "step"], ["plasticity", "stability"], "part", "value")
    parts = parts[parts["value"] > 0]  # of a logarithmic axis
    means = averaged(parts, ["request", "label", "part", "step"], "value")
    lines = (
        alt.Chart(ROWS)
        .mark_line(strokeWidth=1.5, clip=True)
        .encode(
            x=alt.X("step:Q", title="optimiser steps"),
            y=alt.Y("mean:Q", title="norm of the gradient", scale=alt.Scale(type="log")),
            color=colour(labels_of(result)),
            strokeDash=alt.StrokeDash("part:N", title=None),
            opacity=faded(),
            tooltip=["label:N", "part:N", "step:Q", alt.Tooltip("mean:Q", format=".3g"), "n:Q"],
        )
        .properties(width=WIDTH, height=HEIGHT)
    )
    return specification(lines, means, streams_of(result))


def measures_chart(result: RetainResult) -> dict[str, Any] | None:
    """A measure of all methods, with intervals over seeds."""
    names = [name for name in PERCENT if any(cell.measure(name) is not None for cell in result.done)]
    rows = [
        {"request": cell.stream, "label": cell.label, "shown": SHOWN[name], "value": value}
        for cell in result.done
        for name in names
        if (value := cell.measure(name)) is not None
    ]
    means = averaged(pd.DataFrame(rows), ["request", "label", "shown"], "value")
    menu = choice("measure", [SHOWN[name] for name in names], "show ")
    base = alt.Chart(ROWS).encode(
        y=alt.Y("label:N", title=None, sort=labels_of(result), axis=alt.Axis(labelLimit=220)),
        opacity=faded(),
        tooltip=["label:N", "shown:N", alt.Tooltip("mean:Q", format=".3f"), "n:Q"],
    )
    bars = base.mark_bar(height=14, cornerRadiusEnd=2).encode(
        x=alt.X("mean:Q", title="mean over seeds", axis=alt.Axis(format="%")), color=colour(labels_of(result))
    )
    ranges = base.mark_rule(color="#888888").encode(x=alt.X("low:Q"), x2="high:Q")
    whole = alt.layer(bars, ranges).properties(width=ROWS_WIDTH, height=alt.Step(24))
    return specification(whole, means, streams_of(result), f"datum.shown == {menu.name}", [menu])


def cost_chart(result: RetainResult) -> dict[str, Any] | None:
    """Time of learning against accuracy; the size of a point is the memory that is kept."""
    rows = [
        {
            "request": cell.stream, "label": cell.label, "seed": cell.seed, "seconds": cell.seconds,
            "accuracy": cell.measure("accuracy"), "kept": (cell.measure("kept bytes") or 0.0) / 1e6,
            "peak": (cell.peak_bytes or 0) / 2**20,
        }
        for cell in result.done
    ]  # fmt: skip
    points = (
        alt.Chart(ROWS)
        .mark_point(filled=True, stroke="#888888", strokeWidth=0.5)
        .encode(
            x=alt.X("seconds:Q", title="seconds of learning", scale=alt.Scale(zero=False, nice=True)),
            y=alt.Y("accuracy:Q", title="accuracy at the end", axis=alt.Axis(format="%")),
            size=alt.Size("kept:Q", title="kept, MB", scale=alt.Scale(range=[60, 600])),
            color=colour(labels_of(result)),
            opacity=faded(0.85),
            tooltip=[
                "label:N", "seed:O", alt.Tooltip("seconds:Q", format=".3g"), alt.Tooltip("accuracy:Q", format=".3f"),
                alt.Tooltip("kept:Q", title="kept, MB", format=".3g"),
                alt.Tooltip("peak:Q", title="peak memory of the process, MiB", format=".0f"),
            ],
        )
        .properties(width=WIDTH, height=HEIGHT)
    )  # fmt: skip
    return specification(points, pd.DataFrame(rows), streams_of(result))


def _lines(
    result: RetainResult, means: pd.DataFrame, x: str, title: str, options: list[str], dots: bool = True
) -> dict[str, Any]:
    """A line per method with its interval over seeds, of what a menu picks."""
    menu = choice("shown", options, "show ")
    axis = alt.Axis(labelAngle=0) if x.endswith("O") else alt.Axis()
    base = alt.Chart(ROWS).encode(x=alt.X(x, title=title, axis=axis), color=colour(labels_of(result)))
    scale = alt.Scale(domain=[0, 1])
    band = base.mark_area(opacity=0.15).encode(
        y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q", opacity=faded(0.15, 0.02)
    )
    lines = base.mark_line(
        strokeWidth=2, point=alt.OverlayMarkDef(size=36) if dots else False, clip=True
    ).encode(
        y=alt.Y("mean:Q", title="accuracy, mean over seeds", scale=scale, axis=alt.Axis(format="%")),
        opacity=faded(),
        tooltip=["label:N", x, alt.Tooltip("mean:Q", format=".3f"), "n:Q"],
    )
    means = means.assign(low=means["low"].clip(0, 1), high=means["high"].clip(0, 1))
    layers = alt.layer(band, lines).properties(width=WIDTH, height=HEIGHT)
    return specification(layers, means, streams_of(result), f"datum.shown == {menu.name}", [menu])


def _tasks(frame: pd.DataFrame) -> list[str]:
    names = {str(name) for name in frame["shown"] if str(name).startswith("task ")}
    return sorted(names, key=lambda name: int(name.removeprefix("task ")))


PANELS = (
    Panel("matrix", "Accuracy matrix", "Row: after which experience; column: on which task. A column that darkens "
          "downwards is a task that is forgotten.", matrix_chart, wide=True),
    Panel("curves", "While learning", "Accuracy on tasks met, step by step; each point is the lowest of its stretch. "
          "A deep notch that heals is the stability gap. Bands are 95 % intervals: over seeds, or of the records that "
          "were drawn for evaluation, whichever is wider.", curves_chart, wide=True),
    Panel("gradients", "What pulls at the weights", "Where a task begins, what it asks of the weights (plasticity) is far "
          "larger than what holds on to old tasks (stability): the gap opens. Averages over stretches of steps and "
          "seeds; norms of 0 are left out.", gradients_chart, wide=True),
    Panel("time", "Task by task", "Accuracy after every experience.", over_time_chart),
    Panel("measures", "All measures", "Bars are means over seeds, lines their 95 % intervals.", measures_chart),
    Panel("cost", "Time and memory", "Up and left is better. A larger point keeps more beside its network.",
          cost_chart),
)  # fmt: skip
