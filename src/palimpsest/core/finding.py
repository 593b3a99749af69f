"""Finding: one measured fact with its uncertainty; Outcome: what an audit returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal, cast

Row = dict[str, float | int | str | bool | None]
"""One point of a series: a flat record, ready for a table or a chart."""

AS_RETRAINED: Literal["as retrained"] = "as retrained"


class Judgement(StrEnum):
    """What a finding says by itself."""

    AS_RETRAINED = "as retrained"
    SEPARATED = "separated"
    BEYOND = "beyond retrained"
    INVALID = "invalid"
    GOOD = "good"
    BAD = "bad"
    INFORMATION = "information"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Finding:
    """One measured fact.

    Attributes:
        audit: Name of the audit that measured it.
        name: What was measured, unique within the audit.
        value: On the unlearned model; None if it was not run.
        low: Lower end of the 95 % interval of `value`; None if there is none.
        high: Upper end.
        n: Number of samples behind the value.
        ideal: A number, or "as retrained".
        more_is: What a higher value means.
        original: The same measurement on the original model.
        controls: The same measurement on each retrained control.
        k: (value - mean control) / (original - mean control): 0 as never trained on, 1 untouched.
        k_low: Lower end of the 95 % interval of `k`, from the spread between controls and sampling.
        k_high: Upper end.
        valid: Whether original and controls differ clearly more than controls among each other;
            None where no K is defined.
        judgement: What it says by itself.
        bears: What it tells the verdict: "outputs" (the forgotten as seen from outside), "inside"
            (still encoded, or comes back), "lineage" (closeness to the original, which knowledge implies
            but which does not imply knowledge), "utility"; empty for information only.
        note: Budget, reason for being invalid or not run, and the like.
    """

    audit: str
    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    ideal: float | Literal["as retrained"] = AS_RETRAINED
    more_is: Literal["knowledge", "utility", "harm", "neutral"] = "neutral"
    original: float | None = None
    controls: tuple[float, ...] = ()
    k: float | None = None
    k_low: float | None = None
    k_high: float | None = None
    valid: bool | None = None
    judgement: Judgement = Judgement.INFORMATION
    bears: Literal["outputs", "inside", "lineage", "utility", ""] = ""
    note: str = ""

    @property
    def control(self) -> float | None:
        """Mean of the controls."""
        return sum(self.controls) / len(self.controls) if self.controls else None

    @property
    def key(self) -> str:
        """Audit and name, unique within a report."""
        return f"{self.audit}.{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "judgement": self.judgement.value, "controls": list(self.controls)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """The inverse of `to_dict`."""
        values = dict(data)
        values["controls"] = tuple(cast(Sequence[float], values.get("controls") or ()))
        values["judgement"] = Judgement(values["judgement"])
        return cls(**values)


@dataclass(frozen=True)
class Outcome:
    """What an audit returns.

    Attributes:
        findings: Facts for the verdict and the table.
        series: Named lists of rows for the charts (curves, distributions, per-class values).
    """

    findings: tuple[Finding, ...] = ()
    series: Mapping[str, tuple[Row, ...]] = field(default_factory=dict[str, tuple[Row, ...]])
