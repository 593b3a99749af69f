"""AuditReport: the verdict, the findings and the series of one audited model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.audit.verdict import Verdict
from palimpsest.core.finding import Finding, Row
from palimpsest.core.rendering import RENDERERS
from palimpsest.core.writing import write_text

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class AuditReport:
    """What an audit of one model found.

    Attributes:
        verdict: One word (a string: `report.verdict == "removed"`).
        reasons: The findings that the verdict rests on, in words.
        findings: Every measured fact, and a "not run" for every audit that was not.
        series: Rows for charts, by name.
        facts: What was audited: method, request, seed, sizes of the parts.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...]
    series: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def finding(self, key: str) -> Finding:
        """The finding called "audit.name".

        Raises:
            KeyError: If there is none; lists the keys.
        """
        for finding in self.findings:
            if finding.key == key:
                return finding
        raise KeyError(
            f"No finding '{key}'; there are {', '.join(finding.key for finding in self.findings)}."
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per finding."""
        import pandas as pd

        return pd.DataFrame([finding.to_dict() for finding in self.findings])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "verdict": self.verdict.value,
            "reasons": list(self.reasons),
            "findings": [finding.to_dict() for finding in self.findings],
            "series": {name: list(rows) for name, rows in self.series.items()},
            "facts": dict(self.facts),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AuditReport:
        """The inverse of `to_dict`."""
        return cls(
            Verdict(data["verdict"]),
            tuple(data["reasons"]),
            tuple(Finding.from_dict(item) for item in data["findings"]),
            {name: tuple(rows) for name, rows in data["series"].items()},
            dict(data["facts"]),
        )

    def save(self, path: str | Path) -> Path:
        """Write the report: `.html` (self-contained page), `.json` or `.csv`, whole or not at all.

        Raises:
            UnknownName: For another suffix.
            CannotWrite: If the place cannot be written.
        """
        path = Path(path)
        kind = path.suffix.lstrip(".").lower()
        if kind == "json":
            return write_text(path, json.dumps(self.to_dict(), indent=1))
        if kind == "csv":
            return write_text(path, self.to_frame().to_csv(index=False))
        return write_text(path, RENDERERS.get(kind)([self]))
