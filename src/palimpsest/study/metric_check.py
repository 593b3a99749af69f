"""Which measures of a study deserve trust: faithful over its models, robust under attack (checklist E5).

A measure is faithful if it tells models with the knowledge from models without it. A study of several seeds has
both: its originals, and the controls that were retrained without the records. `palimpsest audits` has
"metric-check" for the same question fact by fact, within one cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from palimpsest.audit.metric_checks import (
    faithfulness,
    quantization_robustness,
    relearning_robustness,
    robustness,
)
from palimpsest.audit.report import AuditReport
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.finding import Finding

FEWEST = 2
"""Models a side below which an AUC over models says nothing."""


@dataclass(frozen=True)
class Trust:
    """How far a measure can be trusted.

    Attributes:
        finding: Its key.
        faithfulness: AUC over models with the knowledge against models without it.
        informed: Number of models with it.
        ignorant: Number of models without it.
    """

    finding: str
    faithfulness: float
    informed: int
    ignorant: int


def faithful(reports: Iterable[AuditReport]) -> list[Trust]:
    """Faithfulness of every measure of knowledge in the reports of a study, the most faithful first.

    Every original and every control counts once, however many methods were judged beside it.

    Raises:
        InvalidAudit: If there are fewer than two models with the knowledge, or without it.
    """
    informed: dict[str, dict[tuple[object, ...], float]] = {}
    ignorant: dict[str, dict[tuple[object, ...], float]] = {}
    for report in reports:
        seed, request = report.facts.get("seed"), report.facts.get("request")
        for finding in report.findings:
            if finding.more_is != "knowledge" or finding.original is None or not finding.controls:
                continue
            informed.setdefault(finding.key, {})[seed, request] = finding.original
            for number, value in enumerate(finding.controls):
                ignorant.setdefault(finding.key, {})[seed, request, number] = value
    trusted = [
        Trust(
            key,
            faithfulness(list(known.values()), list(ignorant[key].values())),
            len(known),
            len(ignorant[key]),
        )
        for key, known in informed.items()
        if len(known) >= FEWEST and len(ignorant[key]) >= FEWEST
    ]
    if not trusted:
        raise InvalidAudit(
            f"Faithfulness needs at least {FEWEST} originals and {FEWEST} controls: run the study over several seeds."
        )
    return sorted(trusted, key=lambda item: (-item.faithfulness, item.finding))


def robust(report: AuditReport, bits: int = 4) -> dict[str, float]:
    """R of relearning, Q of rounding and their harmonic mean, from the findings of one report.

    Raises:
        InvalidAudit: If "relearning" or "quantization" was not run, or there is no control.
    """
    start, end = _found(report, "relearning.levelled"), _found(report, "relearning.final")
    plain, rounded = _found(report, "recall.forget_hit"), _found(report, f"quantization.forget_{bits}bit")
    if start.control is None or end.control is None:
        raise InvalidAudit("Robustness needs a retrained model.")
    r = relearning_robustness((_value(start), _value(end)), (start.control, end.control))
    q = quantization_robustness(_value(plain), _value(rounded))
    return {"relearning": r, "quantization": q, "both": robustness(r, q)}


def _found(report: AuditReport, key: str) -> Finding:
    found = next((item for item in report.findings if item.key == key and item.value is not None), None)
    if found is None:
        raise InvalidAudit(f"The report has no finding '{key}': run the audit '{key.partition('.')[0]}'.")
    return found


def _value(finding: Finding) -> float:
    if finding.value is None:
        raise InvalidAudit(f"'{finding.key}' was not run.")
    return finding.value
