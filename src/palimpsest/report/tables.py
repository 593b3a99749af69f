"""The words of a report: verdicts with their reasons, the summary, and every finding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.audit.report import AuditReport
from palimpsest.core.finding import Finding
from palimpsest.report.gathering import label_of, request_of
from palimpsest.study.result import COLUMNS, PERCENT, SHARE, mean_and_half_width


@dataclass(frozen=True)
class Judged:
    """The verdicts on one subject for one request.

    Attributes:
        request: In words.
        label: The subject.
        verdicts: How often each was given, most often first.
        reasons: Of the first report with the most frequent verdict.
        others: Reasons of every seed whose verdict differs: (seed, verdict, reasons).
        cells: Shown values by heading, in the order of `headings`.
        settings: Hyperparameters, in words.
    """

    request: str
    label: str
    verdicts: tuple[tuple[str, int], ...]
    reasons: tuple[str, ...]
    others: tuple[tuple[str, str, tuple[str, ...]], ...]
    cells: tuple[str, ...]
    settings: str = ""


def groups(reports: Sequence[AuditReport]) -> dict[tuple[str, str], list[AuditReport]]:
    """Reports by request and subject, in order."""
    found: dict[tuple[str, str], list[AuditReport]] = {}
    for report in reports:
        found.setdefault((request_of(report), label_of(report)), []).append(report)
    return found


def headings(reports: Sequence[AuditReport]) -> list[str]:
    """Columns of the summary of which something was measured."""
    known = {finding.key for report in reports for finding in report.findings if finding.value is not None}
    shares = any(report.facts.get("share_of_retraining") is not None for report in reports)
    return [*(name for name, key in COLUMNS.items() if key in known), *([SHARE] if shares else [])]


def judgements(reports: Sequence[AuditReport]) -> list[Judged]:
    """One entry per request and subject."""
    columns = headings(reports)
    return [_judged(request, label, mine, columns) for (request, label), mine in groups(reports).items()]


def _judged(request: str, label: str, mine: Sequence[AuditReport], columns: Sequence[str]) -> Judged:
    counts = Counter(report.verdict.value for report in mine).most_common()
    usual = counts[0][0]
    first = next(report for report in mine if report.verdict.value == usual)
    others = tuple(
        (str(report.facts.get("seed", "")), report.verdict.value, report.reasons)
        for report in mine
        if report.verdict.value != usual
    )
    settings = ", ".join(f"{key} = {value}" for key, value in (mine[0].facts.get("settings") or {}).items())
    cells = tuple(_shown(name, mine) for name in columns)
    return Judged(request, label, tuple(counts), first.reasons, others, cells, settings)


def _shown(name: str, mine: Sequence[AuditReport]) -> str:
    """Mean and half of the interval, accuracies and shares in percent; empty if not measured."""
    found = [_value(report, name) for report in mine]
    present = [float(value) for value in found if value is not None]
    if not present:
        return ""
    mean, half, _ = mean_and_half_width(present)
    unit, digits = (100.0, 1) if name in PERCENT else (1.0, 2)
    return f"{mean * unit:.{digits}f}" + ("" if half is None else f" ± {half * unit:.{digits}f}")


def _value(report: AuditReport, name: str) -> float | None:
    if name == SHARE:
        return report.facts.get("share_of_retraining")
    return next((finding.value for finding in report.findings if finding.key == COLUMNS[name]), None)


@dataclass(frozen=True)
class ExposedRecord:
    """A record of `Exposed`, with its scores as they are shown."""

    rank: int
    id: str
    label: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Exposed:
    """The records of one report that an attack is surest of.

    Attributes:
        request: In words.
        label: The subject.
        seed: Of the cell.
        attack: By which they are ranked.
        rows: Most exposed first.
    """

    request: str
    label: str
    seed: str
    attack: str
    rows: tuple[ExposedRecord, ...]


def exposed_tables(reports: Sequence[AuditReport]) -> list[Exposed]:
    """One table per report and attack."""
    tables: list[Exposed] = []
    for report in reports:
        found: dict[str, list[ExposedRecord]] = {}
        for row in report.series.get("exposed", ()):
            numbers = (row[key] for key in ("score", "original", "control", "false_alarms"))
            cells = tuple(f"{value:.3f}" if isinstance(value, float) else "" for value in numbers)
            record = ExposedRecord(int(row["rank"] or 0), str(row["id"]), str(row["label"]), cells)
            found.setdefault(str(row["attack"]), []).append(record)
        about = request_of(report), label_of(report), str(report.facts.get("seed", ""))
        tables += [Exposed(*about, attack, tuple(records)) for attack, records in found.items()]
    return tables


def finding_rows(reports: Sequence[AuditReport]) -> list[dict[str, Any]]:
    """Every finding of every subject, over seeds: what the page's table shows."""
    rows: list[dict[str, Any]] = []
    for (request, label), mine in groups(reports).items():
        by_key: dict[str, list[Finding]] = {}
        for report in mine:
            for finding in report.findings:
                by_key.setdefault(finding.key, []).append(finding)
        rows += [{"request": request, "label": label, **_row(key, found)} for key, found in by_key.items()]
    return rows


def _row(key: str, found: Sequence[Finding]) -> dict[str, Any]:
    judged = Counter(finding.judgement.value for finding in found).most_common()
    single = found[0] if len(found) == 1 else None
    return {
        "finding": key,
        "value": _mean([finding.value for finding in found], single and (single.low, single.high)),
        "original": _mean([finding.original for finding in found]),
        "retrained": _mean([finding.control for finding in found]),
        "k": _mean([finding.k for finding in found], single and (single.k_low, single.k_high)),
        "judgement": ", ".join(f"{word} {n}" if len(judged) > 1 else word for word, n in judged),
        "n": found[0].n,
        "bears": found[0].bears,
        "note": found[0].note,
    }


def _mean(numbers: Sequence[float | None], interval: Any = None) -> list[float] | None:
    """Mean, low and high; the interval is that over seeds, or of the only measurement."""
    known = [number for number in numbers if number is not None and np.isfinite(number)]
    if not known:
        return None
    mean, half, _ = mean_and_half_width([float(number) for number in known])
    if half is not None:
        return [round(item, 3) for item in (mean, mean - half, mean + half)]
    ends = [round(end, 3) for end in interval or () if end is not None and np.isfinite(end)]
    return [round(mean, 3), *(ends if len(ends) == 2 else [])]
