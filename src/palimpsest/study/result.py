"""The result of a study: cells with their audit reports, and what they say together."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from palimpsest.audit.report import AuditReport
from palimpsest.core.finding import Finding
from palimpsest.core.writing import write_text

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

Mean = tuple[float, float | None, int]
"""Mean, half width of its 95 % interval (None for a single value), number of values."""
COLUMNS = {
    "forget": "utility.forget_accuracy",
    "retain": "utility.retain_accuracy",
    "test": "utility.test_accuracy",
    "forget hits": "recall.forget_hit",
    "retain hits": "recall.retain_hit",
    "test hits": "recall.test_hit",
    "forget probability": "recall.forget_probability",
    "log10 forget quality": "tofu.log10_forget_quality",
    "model utility": "tofu.model_utility",
    "hazard accuracy": "wmdp.accuracy",
    "restoration": "restor.restoration",
    "forgetting": "restor.forgetting",
    "others": "restor.others_rate",
    "forget error": "regression.forget_mae",
    "retain error": "regression.retain_mae",
    "test error": "regression.test_mae",
    "W1 to retrained": "regression.w1_to_retrained",
    "membership AUC": "membership.loss_auc",
    "text membership AUC": "text-membership.loss_auc",
    "relearning": "relearning.area",
    "separation": "separation.strongest",
    "CKA to original": "representation.cka_to_original",
}
"""Findings that frames and summaries show, by heading."""
SHARE = "share of retraining"
PERCENT = ("forget", "retain", "test", "forget hits", "retain hits", "test hits", SHARE)


@dataclass(frozen=True)
class CellResult:
    """One method on one request with one seed.

    Attributes:
        key: Content hash.
        method: Registered name, or "original".
        label: As in tables.
        request: In words.
        seeds: Of training, unlearning and auditing.
        status: "done", "failed" (for a reason that will come again), "crashed" (run again by the next
            `compare`) or "waiting".
        reason: Why it has no report.
        detail: Traceback of an unexpected error.
        seconds: Of the method, without auditing.
        peak_bytes: Peak memory while the method ran.
        report: What the audits found; None unless done.
    """

    key: str
    method: str
    label: str
    request: str
    seeds: dict[str, int]
    status: str
    reason: str = ""
    detail: str = ""
    seconds: float | None = None
    peak_bytes: int | None = None
    report: AuditReport | None = None

    @property
    def share(self) -> float | None:
        """Seconds as a share of the mean time of retraining for the same request."""
        return None if self.report is None else self.report.facts.get("share_of_retraining")

    def value(self, finding: str) -> float | None:
        """The value of a finding ("utility.test_accuracy"), or None if there is none."""
        found = self.finding(finding)
        return None if found is None else found.value

    def k(self, finding: str) -> float | None:
        """The K of a finding, or None if there is none or its probe is invalid."""
        found = self.finding(finding)
        return None if found is None else found.k

    def finding(self, key: str) -> Finding | None:
        """A finding ("utility.test_accuracy"), or None if there is none."""
        if self.report is None:
            return None
        return next((item for item in self.report.findings if item.key == key), None)


@dataclass(frozen=True)
class Summary:
    """A method on a request, over seeds.

    Attributes:
        method: Registered name, or "original".
        label: As in tables.
        request: In words.
        verdicts: How often each verdict was given.
        failures: Reasons of cells that failed.
        means: By heading of `COLUMNS`, and "share of retraining".
        ks: K of the same findings, where valid.
    """

    method: str
    label: str
    request: str
    verdicts: dict[str, int]
    failures: list[str]
    means: dict[str, Mean]
    ks: dict[str, Mean] = field(default_factory=dict[str, Mean])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "method": self.method,
            "label": self.label,
            "request": self.request,
            "verdicts": self.verdicts,
            "failures": self.failures,
            **{heading: _plain(mean) for heading, mean in self.means.items()},
            "k": {heading: _plain(mean) for heading, mean in self.ks.items()},
        }


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

    @property
    def failures(self) -> list[CellResult]:
        """Cells that failed or crashed."""
        return [cell for cell in self.cells if cell.status in ("failed", "crashed")]

    @property
    def failed(self) -> list[str]:
        """The same in words."""
        return [
            f"{cell.label}, {cell.request}, seed {cell.seeds['training']}: {cell.reason}"
            for cell in self.failures
        ]

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
        return [_summary(cells) for cells in groups.values()]

    def to_frame(self) -> pd.DataFrame:
        """One row per cell: method, request, seeds, status, verdict, cost, the shown findings and their K."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for cell in self.cells:
            row: dict[str, Any] = {
                "method": cell.method, "label": cell.label, "request": cell.request, **cell.seeds,
                "status": cell.status, "reason": cell.reason,
                "verdict": cell.report.verdict.value if cell.report else None,
                "seconds": cell.seconds, "peak_bytes": cell.peak_bytes, SHARE: cell.share,
            }  # fmt: skip
            for heading, finding in COLUMNS.items():
                row[heading], row[f"K {heading}"] = cell.value(finding), cell.k(finding)
            rows.append(row)
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the summary and every cell with its report."""
        return {
            "name": self.name,
            "summary": [item.to_dict() for item in self.summary()],
            "cells": [
                {
                    "key": cell.key, "method": cell.method, "label": cell.label, "request": cell.request,
                    "seeds": cell.seeds, "status": cell.status, "reason": cell.reason, "seconds": cell.seconds,
                    "peak_bytes": cell.peak_bytes, "report": cell.report.to_dict() if cell.report else None,
                }
                for cell in self.cells
            ],
        }  # fmt: skip

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(self.to_dict())

    def save(self, path: str | Path) -> Path:
        """Write all of it as JSON, whole or not at all."""
        return write_text(path, self.to_json())

    def table(self) -> Table:
        """The summary for a terminal: means over seeds with 95 % intervals, and verdicts."""
        from rich.markup import escape
        from rich.table import Table

        summaries = self.summary()
        headings = [*(name for name in COLUMNS if any(name in item.means for item in summaries)), SHARE]
        title = f"{self.name}: mean ± half of the 95 % interval over seeds; accuracies and cost in percent"
        table = Table(title=escape(title), title_justify="left")
        table.add_column("method", no_wrap=True)
        table.add_column("verdict")
        for heading in headings:
            table.add_column(heading, justify="right")
        before = ""
        for item in summaries:
            if item.request != before:
                table.add_section()
                table.add_row(f"[bold]{escape(item.request)}[/bold]")
            figures = [shown(heading, item.means) for heading in headings]
            table.add_row(escape(item.label), escape(verdicts_of(item)), *figures)
            before = item.request
        return table


def mean_and_half_width(values: Sequence[float]) -> Mean:
    """Mean, half width of its 95 % interval by Student's t (None for a single value), and number."""
    n = len(values)
    if n < 2:
        return float(values[0]), None, n
    half = float(stats.t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)), half, n


def _summary(cells: Sequence[CellResult]) -> Summary:
    verdicts: dict[str, int] = {}
    for cell in cells:
        if cell.report is not None:
            verdicts[cell.report.verdict.value] = verdicts.get(cell.report.verdict.value, 0) + 1
    means = {heading: [cell.value(finding) for cell in cells] for heading, finding in COLUMNS.items()}
    means[SHARE] = [cell.share for cell in cells]
    ks = {heading: [cell.k(finding) for cell in cells] for heading, finding in COLUMNS.items()}
    failures = [cell.reason for cell in cells if cell.status in ("failed", "crashed")]
    first = cells[0]
    return Summary(first.method, first.label, first.request, verdicts, failures, _means(means), _means(ks))


def _means(columns: dict[str, list[float | None]]) -> dict[str, Mean]:
    present = {name: [value for value in values if value is not None] for name, values in columns.items()}
    return {name: mean_and_half_width(values) for name, values in present.items() if values}


def _plain(mean: Mean) -> dict[str, float | int | None]:
    return dict(zip(("mean", "half_width", "n"), mean, strict=True))


def verdicts_of(item: Summary) -> str:
    """How often each verdict was given, and the first failure, in words."""
    words = [f"{word} {count}" if len(item.verdicts) > 1 else word for word, count in item.verdicts.items()]
    failed = [f"failed {len(item.failures)}: {item.failures[0]}"] if item.failures else []
    return ", ".join([*words, *failed]) or "waiting"


def shown(heading: str, means: dict[str, Mean]) -> str:
    """A mean with its interval; an empty field where there is nothing to show."""
    if heading not in means:
        return ""
    mean, half, _ = means[heading]
    unit, digits = (100.0, 1) if heading in PERCENT else (1.0, 2)
    if half is None:
        return f"{mean * unit:.{digits}f}"
    return f"{mean * unit:.{digits}f} ±{half * unit:.{digits}f}"
