"""What the charts and tables are made of: values and series of many audit reports, in frames.

A chart compares subjects: the methods, and the two ends of the scale, "original" and "retrained". A study
audits both ends as cells of their own; a single audit knows them as the other models in its evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from palimpsest.audit.report import AuditReport

ORIGINAL, RETRAINED = "original", "retrained"
GROUP = ["request", "label"]


def label_of(report: AuditReport) -> str:
    """The subject that a report judges."""
    if report.facts.get("method") == "retrain" and not report.facts.get("settings"):
        return RETRAINED
    return str(report.facts.get("label") or report.facts.get("method") or "unlearned")


def request_of(report: AuditReport) -> str:
    """The erasure request of a report, in words."""
    return str(report.facts.get("request") or "the request")


def requests_of(reports: Iterable[AuditReport]) -> list[str]:
    """All requests, in order."""
    return list(dict.fromkeys(request_of(report) for report in reports))


def labels_of(reports: Iterable[AuditReport]) -> list[str]:
    """All subjects: the two ends of the scale first, then the methods in order."""
    labels = dict.fromkeys(label_of(report) for report in reports)
    return [ORIGINAL, RETRAINED, *(label for label in labels if label not in (ORIGINAL, RETRAINED))]


def values(reports: Sequence[AuditReport], finding: str) -> pd.DataFrame:
    """A finding of every subject: request, label, value; one row per seed (or control)."""
    audited = {(request_of(report), label_of(report)) for report in reports}
    rows: dict[tuple[object, ...], float] = {}
    for number, report in enumerate(reports):
        found = next((item for item in report.findings if item.key == finding), None)
        if found is None:
            continue
        request, seed = request_of(report), report.facts.get("seed", number)
        if found.value is not None:
            rows[request, label_of(report), number] = found.value
        if found.original is not None and (request, ORIGINAL) not in audited:
            rows[request, ORIGINAL, ("seed", seed)] = found.original
        if (request, RETRAINED) not in audited:
            rows.update({(request, RETRAINED, ("control", i)): v for i, v in enumerate(found.controls)})
    return pd.DataFrame(
        [(request, label, value) for (request, label, _), value in rows.items()],
        columns=pd.Index([*GROUP, "value"]),
    )


def series(reports: Sequence[AuditReport], name: str) -> pd.DataFrame:
    """A series of every subject: its fields, and request, label, seed; empty if no report has it."""
    audited = {(request_of(report), label_of(report)) for report in reports}
    rows: list[dict[str, object]] = []
    seen: set[tuple[object, ...]] = set()
    for number, report in enumerate(reports):
        request, seed = request_of(report), report.facts.get("seed", number)
        subjects: dict[str, tuple[str, object]] = {}
        for row in report.series.get(name, ()):
            role = str(row.get("model"))
            if role not in subjects:
                subjects[role] = _subject(role, label_of(report), request, seed, audited)
        fresh = {
            role: about for role, about in subjects.items() if about[0] and (request, *about) not in seen
        }
        seen |= {(request, *about) for about in fresh.values()}
        rows += [
            {**row, "request": request, "label": fresh[role][0], "seed": str(fresh[role][1])}
            for row in report.series.get(name, ())
            if (role := str(row.get("model"))) in fresh
        ]
    return pd.DataFrame(rows)


def _subject(
    role: str, label: str, request: str, seed: object, audited: set[tuple[str, str]]
) -> tuple[str, object]:
    """Whom the rows of a role are about (nobody if that subject has a report of its own), and the seed."""
    if role == "unlearned":
        return label, seed
    if role == ORIGINAL:
        return ("" if (request, ORIGINAL) in audited else ORIGINAL), seed
    return ("" if (request, RETRAINED) in audited else RETRAINED), role


def averaged(frame: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Mean over seeds with its 95 % interval: the fields `by`, then mean, low, high and n."""
    known = frame[np.isfinite(pd.to_numeric(frame[value]))]
    grouped = known.groupby(list(by), sort=False)[value].agg(["mean", "std", "count"]).reset_index()
    half = half_width(grouped["std"].to_numpy(float), grouped["count"].to_numpy())
    columns = {"mean": grouped["mean"], "low": grouped["mean"] - half, "high": grouped["mean"] + half}
    return grouped[list(by)].assign(**columns, n=grouped["count"])


def half_width(deviation: NDArray[np.float64], n: NDArray[np.int64]) -> NDArray[np.float64]:
    """Half of the 95 % interval of means by Student's t; 0 for a single value, which has none."""
    several = n > 1
    quantile = stats.t.ppf(0.975, np.maximum(n - 1, 1))
    return np.where(several, quantile * np.nan_to_num(deviation) / np.sqrt(n), 0.0)
