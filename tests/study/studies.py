"""Small studies that several tests run."""

from __future__ import annotations

from typing import Any

from palimpsest.study.result import StudyResult


def tiny(**changes: Any) -> dict[str, Any]:
    """A study of a second: a narrow network, two epochs, one audit."""
    recipe: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": "mlp", "settings": {"width": 16, "depth": 1}},
        "training": {"epochs": 2},
        "forget": ["label=3"],
        "methods": ["ssd", "finetune"],
        "audits": ["utility"],
        "controls": 1,
        "seeds": 1,
    }
    return {**recipe, **changes}


def figures(result: StudyResult) -> dict[str, Any]:
    """All that a study found, without what a clock measured, by cell."""
    found: dict[str, Any] = {}
    for cell in result.cells:
        report = None
        if cell.report is not None:
            report = {
                "verdict": cell.report.verdict.value,
                "reasons": list(cell.report.reasons),
                "findings": [item.to_dict() for item in cell.report.findings if item.audit != "cost"],
                "series": {
                    name: list(rows) for name, rows in sorted(cell.report.series.items()) if name != "cost"
                },
            }
        found[cell.key] = (cell.request, cell.label, cell.seeds, cell.status, cell.reason, report)
    return found
