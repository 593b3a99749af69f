"""The result of a study of continual learning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.core.writing import write_text
from palimpsest.study.result import Mean, mean_and_half_width

if TYPE_CHECKING:
    from rich.table import Table

PERCENT = (
    "accuracy",
    "average incremental accuracy",
    "forgetting",
    "BWT",
    "FWT",
    "min-ACC",
    "WC-ACC",
    "WF10",
)
SHOWN = {
    "accuracy": "accuracy",
    "average incremental accuracy": "incremental",
    "forgetting": "forgetting",
    "BWT": "BWT",
    "FWT": "FWT",
    "min-ACC": "min-ACC",
    "WC-ACC": "WC-ACC",
    "WF10": "WF10",
    "seconds": "seconds",
    "kept bytes": "kept",
}
"""Measures of the table, with their headings."""


@dataclass(frozen=True)
class RetainCell:
    """One method on one stream with one seed.

    Attributes:
        key: Content hash.
        method: Registered name.
        label: As in tables.
        stream: Short form.
        seed: Of everything.
        status: "done", "failed", "crashed" or "waiting".
        reason: Why it is not done.
        detail: Traceback of an unexpected error.
        seconds: Of learning.
        peak_bytes: Peak memory of the process meanwhile.
        outcome: As `retain.Outcome.to_dict` gives it; empty unless done.
    """

    key: str
    method: str
    label: str
    stream: str
    seed: int
    status: str
    reason: str = ""
    detail: str = ""
    seconds: float | None = None
    peak_bytes: int | None = None
    outcome: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def measure(self, name: str) -> float | None:
        """A figure by name ("accuracy", "forgetting", "min-ACC", ...); None if there is none."""
        return self.outcome.get("measures", {}).get(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "key": self.key, "method": self.method, "label": self.label, "stream": self.stream,
            "seed": self.seed, "status": self.status, "reason": self.reason, "seconds": self.seconds,
            "peak_bytes": self.peak_bytes, **self.outcome,
        }  # fmt: skip


@dataclass(frozen=True)
class RetainSummary:
    """One method on one stream over all seeds."""

    stream: str
    label: str
    seeds: int
    measures: Mapping[str, Mean]
    sampling: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    """Mean over seeds of the ends of the intervals that subsampled evaluation leaves (`sampling_intervals`)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "stream": self.stream,
            "label": self.label,
            "seeds": self.seeds,
            **{
                name: {"mean": mean, "half_width": half, "n": n}
                for name, (mean, half, n) in self.measures.items()
            },
            "sampling": {name: list(ends) for name, ends in self.sampling.items()},
        }


@dataclass(frozen=True)
class RetainResult:
    """All cells of a study, in the order of the recipe."""

    name: str
    folder: Path
    cells: tuple[RetainCell, ...]

    @property
    def done(self) -> list[RetainCell]:
        """Cells with an outcome."""
        return [cell for cell in self.cells if cell.status == "done"]

    @property
    def failed(self) -> list[str]:
        """Cells that have none, in words."""
        return [
            f"{cell.label} on {cell.stream}, seed {cell.seed}: {cell.reason or cell.status}"
            for cell in self.cells
            if cell.status != "done"
        ]

    def summary(self) -> list[RetainSummary]:
        """Means over seeds with their 95 % intervals, by stream and method."""
        groups: dict[tuple[str, str], list[RetainCell]] = {}
        for cell in self.done:
            groups.setdefault((cell.stream, cell.label), []).append(cell)
        return [_summary(stream, label, cells) for (stream, label), cells in groups.items()]

    def table(self) -> Table:
        """For the terminal; shares in per cent."""
        from rich.table import Table

        rows = self.summary()
        names = [name for name in SHOWN if any(name in row.measures for row in rows)]
        streams = list(dict.fromkeys(row.stream for row in rows))
        table = Table(title=self.name)
        for heading in (["stream"] if len(streams) > 1 else []) + ["method"]:
            table.add_column(heading)
        for name in names:
            table.add_column(SHOWN[name], justify="right")
        for row in rows:
            cells = [shown(name, row.measures.get(name), row.sampling.get(name)) for name in names]
            table.add_row(*([row.stream] if len(streams) > 1 else []), row.label, *cells)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "summary": [row.to_dict() for row in self.summary()],
            "cells": [cell.to_dict() for cell in self.cells],
        }

    def save(self, path: Path) -> Path:
        """Write everything as JSON."""
        return write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")


def shown(name: str, mean: Mean | None, sampling: tuple[float, float] | None = None) -> str:
    """A mean with its half width over seeds, and in brackets what subsampled evaluation leaves open."""
    if mean is None:
        return ""
    value, half, _ = mean
    if name == "kept bytes":
        return f"{value / 1e6:.2f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"
    scale, digits = (100, 1) if name in PERCENT else (1, 1)
    interval = "" if half is None else f" ± {scale * half:.{digits}f}"
    drawn = "" if sampling is None else " [{:.0f}, {:.0f}]".format(*(scale * end for end in sampling))
    return f"{scale * value:.{digits}f}{interval}{drawn}"


def _summary(stream: str, label: str, cells: list[RetainCell]) -> RetainSummary:
    measures: dict[str, Mean] = {}
    for name in cells[0].outcome.get("measures", {}):
        values = [value for cell in cells if (value := cell.measure(name)) is not None]
        if values:
            measures[name] = mean_and_half_width(values)
    peaks = [float(cell.peak_bytes) for cell in cells if cell.peak_bytes]
    if peaks:
        measures["peak bytes"] = mean_and_half_width(peaks)
    known = [cell.outcome.get("sampling", {}) for cell in cells]
    sampling = {
        name: (_mean_end(known, name, 0), _mean_end(known, name, 1))
        for name in known[0]
        if all(name in each for each in known)
    }
    return RetainSummary(stream, label, len(cells), measures, sampling)


def _mean_end(known: list[Mapping[str, list[float]]], name: str, end: int) -> float:
    return sum(each[name][end] for each in known) / len(known)
