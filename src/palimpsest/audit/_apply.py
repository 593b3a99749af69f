"""The verb `audit`: check everything, gather the evidence once, run the audits, judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from palimpsest.audit.report import AuditReport
from palimpsest.audit.verdict import judge
from palimpsest.core.auditing import AUDITS, Audit, Checked, build_audit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Judgement, Row
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.parts.reinitialise import check_finite


def audit(
    unlearned: nn.Module,
    split: ForgetSplit,
    task: Task,
    original: nn.Module | None = None,
    retrained: nn.Module | Sequence[nn.Module] | None = None,
    audits: Sequence[str | Audit] | None = None,
    seed: int = 0,
    runtime: Runtime | None = None,
    facts: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    peak_bytes: int | None = None,
) -> AuditReport:
    """Audit an unlearned model against the original and against retrained controls.

    Args:
        unlearned: The model to judge.
        split: The erasure request.
        task: The domain.
        original: The model before the request.
        retrained: One or several models retrained without the forget records, of different seeds. Without
            one the verdict is inconclusive; several make every judgement sharper.
        audits: Names (with the budget of the domain) or instances; by default all that need no shadow models
            and apply to the split.
        seed: Of everything random in the audits.
        runtime: Device and progress; by default this machine with `seed`.
        facts: What to note on the report (method, request, ...).
        seconds: Time taken, by "unlearned" and "retrained", for the cost findings.
        peak_bytes: Peak memory of the method.

    Raises:
        UnknownName: For an unknown audit.
        NonFinite, InvalidLabels, ModelMismatch: If models and records do not fit, before any work.
    """
    if retrained is None:
        controls: list[nn.Module] = []
    else:
        controls = [retrained] if isinstance(retrained, nn.Module) else list(retrained)
    runtime = runtime or Runtime(seed=seed)
    times = dict(seconds or {})
    evidence = Evidence(unlearned, split, task, runtime, original, controls, times, peak_bytes)
    return examine(evidence, audits, facts)


def examine(
    evidence: Evidence,
    audits: Sequence[str | Audit] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> AuditReport:
    """Audit what an `Evidence` holds; `Evidence.judging` lets several models share one set of controls.

    Args and errors are those of `audit`.
    """
    chosen = _chosen(audits, evidence.task.name)
    split = evidence.split
    for role in evidence.roles:
        model = evidence.runtime.place(evidence.model(role))
        evidence.remember("checked", partial(_check, model, role, evidence), role)
    findings: list[Finding] = []
    series: dict[str, tuple[Row, ...]] = {}
    for item in chosen:
        if isinstance(item, Checked) and not _missing(item, evidence):
            item.check(evidence)
    for item in evidence.runtime.track(chosen, "auditing"):
        missing = _missing(item, evidence)
        if missing:
            findings.append(_not_run(item.card.name, missing))
            continue
        outcome = item.run(evidence)
        findings.extend(outcome.findings)
        for name, rows in outcome.series.items():
            series[name] = (*series.get(name, ()), *rows)
    ran = {item.card.name for item in chosen}
    findings.extend(_not_run(name, "not asked for") for name in AUDITS.names() if name not in ran)
    judgment = judge(findings, len(split.forget))
    sizes = {f"n_{name}": len(part) for name, part in split.parts.items()}
    known = {"request": split.description, "controls": len(evidence.controls), **sizes, **(facts or {})}
    return AuditReport(judgment.verdict, judgment.reasons, tuple(findings), series, known)


def _check(model: nn.Module, role: str, evidence: Evidence) -> bool:
    check_finite(model, f"{role} model")
    for records in evidence.split.parts.values():
        evidence.task.check(model, records)
    return True


def _chosen(audits: Sequence[str | Audit] | None, task: str) -> list[Audit]:
    wanted = [name for name, cls in AUDITS.items() if cls.card.default] if audits is None else audits
    return [build_audit(item, task) if isinstance(item, str) else item for item in wanted]


def _missing(item: Audit, evidence: Evidence) -> str:
    parts = [part for part in item.card.parts if not evidence.has(part)]
    if parts:
        return f"the split has no {' and no '.join(parts)} part"
    tasks = item.card.tasks
    if "any" not in tasks and evidence.task.name not in tasks:
        return f"not defined for {evidence.task.name}"
    return ""


def _not_run(name: str, why: str) -> Finding:
    return Finding(name, "audit", None, judgement=Judgement.NOT_RUN, note=why)
