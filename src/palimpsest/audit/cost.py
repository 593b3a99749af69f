"""What forgetting cost: seconds, share of retraining, peak memory, weights changed (checklist E2, E4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from palimpsest.audit.distance import not_run
from palimpsest.audit.similarity import matched_names
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Outcome, Row

MEBIBYTE = 2**20


@audit("cost", code="E2", parts=())
@dataclass(frozen=True)
class Cost:
    """Seconds, share of the retraining time and peak memory of the method, as far as they were measured."""

    def run(self, evidence: Evidence) -> Outcome:
        """What is known of the cost; what is not is said to be not run."""
        seconds, retrained = evidence.seconds.get("unlearned"), evidence.seconds.get("retrained")
        share = None if seconds is None or not retrained else seconds / retrained
        memory = None if evidence.peak_bytes is None else evidence.peak_bytes / MEBIBYTE
        known = {
            "seconds": (seconds, "wall-clock time of the method, evaluation left out"),
            "share": (share, "of the time that retraining takes"),
            "peak_mb": (memory, "peak memory in MiB of the process or device while the method ran"),
        }
        findings = [
            not_run("cost", name, "not measured")
            if value is None
            else Finding("cost", name, value, ideal=0.0, n=1, note=note)
            for name, (value, note) in known.items()
        ]
        rows: list[Row] = [
            {"what": name, "value": value} for name, (value, _) in known.items() if value is not None
        ]
        return Outcome((*findings, _changed(evidence)), {"cost": tuple(rows)})


def share_changed(before: nn.Module, after: nn.Module) -> tuple[float, int]:
    """Share of single weights that differ between two models, and how many were compared.

    Parameters are matched by name, whatever wrapper stands around one of the models; buffers (batch-norm
    statistics) do not count.

    Raises:
        InvalidAudit: If a parameter of `before` has no counterpart of its shape.
    """
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    pairs = matched_names(_sizes(old), _sizes(new))
    if len(pairs) < len(old) or any(old[a].shape != new[b].shape for a, b in pairs):
        raise InvalidAudit("The two models are not of one architecture.")
    changed = sum(int(torch.ne(old[a].detach().cpu(), new[b].detach().cpu()).sum()) for a, b in pairs)
    total = sum(tensor.numel() for tensor in old.values())
    return changed / max(total, 1), total


def _sizes(parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in parameters.items()}


def _changed(evidence: Evidence) -> Finding:
    if evidence.original is None:
        return not_run("cost", "weights_changed", "the original model is not at hand")
    try:
        share, total = share_changed(evidence.original, evidence.unlearned)
    except InvalidAudit as problem:
        return not_run("cost", "weights_changed", str(problem))
    note = "share of single weights that differ from the original's"
    return Finding("cost", "weights_changed", share, n=total, note=note)
