"""The result of a study: cells with their audit reports, and what they say together."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from palimpsest.audit.report import AuditReport
from palimpsest.core.writing import write_text

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

COLUMNS = {
    "forget": "utility.forget_accuracy",
    "retain": "utility.retain_accuracy",
    "test": "utility.test_accuracy",
    "membership AUC": "membership.auc",
    "relearning": "relearning.area",
    "separation": "separation.strongest",
}
"""Findings that the summary shows, by heading."""


@dataclass(frozen=True)
class CellResult:
    """One method on one request with one seed.

    Attributes:
        key: Content hash.
        method: Registered name, or "original".
        label: As in tables.
        request: In words.
        seeds: Of training, unlearning and auditing.
        status: "done", "failed", "crashed" or "waiting".
        reason: Why it has no report.
        seconds: Of the method.
        report: What the audits found; None unless done.
    """

    key: str
    method: str
    label: str
    request: str
    seeds: dict[str, int]
    status: str
    reason: str = ""
    seconds: float | None = None
    report: AuditReport | None = None

    def value(self, finding: str) -> float | None:
        """The value of a finding ("utility.test_accuracy"), or None if there is none."""
        found = self._finding(finding)
        return None if found is None else found.value

    def k(self, finding: str) -> float | None:
        """The K of a finding, or None if there is none or its probe is invalid."""
        found = self._finding(finding)
        return None if found is None else found.k

    def _finding(self, key: str) -> Any:
        if self.report is None:
            return None
        return next((item for item in self.report.findings if item.key == key), None)


@dataclass(frozen=True)
class Summary:
    """A method on a request, over seeds.

    Attributes:
        label: Of the method.
        request: In words.
        verdicts: How often each verdict was given.
        failures: Reasons of cells that failed.
        means: (mean, half width of the 95 % interval or None, number) by heading.
    """

    label: str
    request: str
    verdicts: dict[str, int]
    failures: list[str]
    means: dict[str, tuple[float, float | None, int]]


@dataclass(frozen=True)
class StudyResult:
    """All cells of a study, in the order of its tables."""

    name: str
    folder: Path
    cells: tuple[CellResult, ...]

    @property
    def reports(self) -> list[AuditReport]:
        """Reports of all cells that are done."""
        return [cell.report for cell in self.cells if cell.report is not None]

    def select(self, label: str | None = None, request: str | None = None) -> list[CellResult]:
        """Cells of a method (by label or name) and a request (by its words)."""
        return [
            cell
            for cell in self.cells
            if label in (None, cell.label, cell.method) and request in (None, cell.request)
        ]

    def summary(self) -> list[Summary]:
        """One entry per method and request, in order."""
        groups: dict[tuple[str, str], list[CellResult]] = {}
        for cell in self.cells:
            groups.setdefault((cell.request, cell.label), []).append(cell)
        return [_summary(label, request, cells) for (request, label), cells in groups.items()]

    def to_frame(self) -> pd.DataFrame:
        """One row per cell: method, request, seeds, status, verdict, seconds, the shown findings and their K."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for cell in self.cells:
            row: dict[str, Any] = {
                "method": cell.method, "label": cell.label, "request": cell.request, **cell.seeds,
                "status": cell.status, "reason": cell.reason, "seconds": cell.seconds,
                "verdict": cell.report.verdict.value if cell.report else None,
            }  # fmt: skip
            for heading, finding in COLUMNS.items():
                row[heading], row[f"K {heading}"] = cell.value(finding), cell.k(finding)
            rows.append(row)
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the summary and every cell with its report."""
        return {
            "name": self.name,
            "summary": [
                {
                    "method": item.label,
                    "request": item.request,
                    "verdicts": item.verdicts,
                    "failures": item.failures,
                    **{
                        heading: {"mean": mean, "half_width": half, "n": n}
                        for heading, (mean, half, n) in item.means.items()
                    },
                }
                for item in self.summary()
            ],
            "cells": [
                {
                    "key": cell.key, "method": cell.method, "label": cell.label, "request": cell.request,
                    "seeds": cell.seeds, "status": cell.status, "reason": cell.reason, "seconds": cell.seconds,
                    "report": cell.report.to_dict() if cell.report else None,
                }
                for cell in self.cells
            ],
        }  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write all of it as JSON."""
        return write_text(path, json.dumps(self.to_dict(), indent=1))

    def table(self) -> Table:
        """The summary for a terminal: means over seeds with 95 % intervals, and verdicts."""
        from rich.table import Table

        table = Table(title=f"{self.name}: mean and 95 % interval over seeds", title_justify="left")
        for heading in ("request", "method", "verdict", *COLUMNS, "share of retraining"):
            table.add_column(heading, no_wrap=heading == "method")
        before = ""
        for item in self.summary():
            cells = [_shown(item.means.get(heading)) for heading in (*COLUMNS, "share of retraining")]
            verdicts = ", ".join(f"{word} {count}" for word, count in item.verdicts.items())
            failed = f"failed: {item.failures[0]}" if item.failures else ""
            words = "; ".join(part for part in (verdicts, failed) if part)
            if before and before != item.request:
                table.add_section()
            table.add_row("" if before == item.request else item.request, item.label, words, *cells)
            before = item.request
        return table


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None, int]:
    """Mean, half width of its 95 % interval by Student's t (None for a single value), and number."""
    n = len(values)
    if n < 2:
        return float(values[0]), None, n
    half = float(stats.t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)), half, n


def _summary(label: str, request: str, cells: Sequence[CellResult]) -> Summary:
    verdicts: dict[str, int] = {}
    for cell in cells:
        if cell.report is not None:
            verdicts[cell.report.verdict.value] = verdicts.get(cell.report.verdict.value, 0) + 1
    means: dict[str, tuple[float, float | None, int]] = {}
    for heading, finding in COLUMNS.items():
        values = [value for cell in cells if (value := cell.value(finding)) is not None]
        if values:
            means[heading] = mean_and_half_width(values)
    shares = [
        float(share)
        for cell in cells
        if cell.report is not None and (share := cell.report.facts.get("share_of_retraining")) is not None
    ]
    if shares:
        means["share of retraining"] = mean_and_half_width(shares)
    failures = [cell.reason for cell in cells if cell.status in ("failed", "crashed")]
    return Summary(label, request, verdicts, failures, means)


def _shown(entry: tuple[float, float | None, int] | None) -> str:
    if entry is None:
        return "not run"
    mean, half, _ = entry
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ±{half:.3f}"
