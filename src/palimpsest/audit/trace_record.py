"""The trace of a request: what was asked, what was done, with hashes of records and weights (checklist E4)."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, cast

import torch
from torch import nn

from palimpsest.core.auditing import audit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.parts.fingerprint import architecture_fingerprint, records_fingerprint

NAMED = 200
"""At most so many touched parameters are named; all are counted."""


@audit("trace", code="E4", parts=())
@dataclass(frozen=True)
class Trace:
    """Record what a later reader must know to check a claim of erasure.

    Hashes of the ids and contents of all parts, of the weights before and after and of every control; method,
    settings, declared intention and seed; which parameters moved; versions. Nothing is judged but one thing: a
    method that declares removal and moved no parameter is said so. A report with this record can be signed as
    it is.
    """

    def run(self, evidence: Evidence) -> Outcome:
        """Share of parameters touched, whether the intention fits, and the record."""
        rows: list[Row] = []

        def note(what: str, value: Any, name: str = "") -> None:
            rows.append(
                {"what": what, "name": name, "value": value if isinstance(value, int | float) else str(value)}
            )

        split = evidence.split
        note("request", split.description)
        for name, records in split.parts.items():
            note("records", len(records), name)
            note("sha256 of ids", ids_digest(records.ids), name)
            note("fingerprint of records", records_fingerprint(records), name)
        for role in evidence.roles:
            model = evidence.model(role)
            note("sha256 of weights", weights_digest(model), role)
            note("architecture", architecture_fingerprint(model), role)
        method = evidence.method
        if method is not None:
            note("method", method.card.name)
            note("intention", method.card.intention)
            settings = asdict(cast(Any, method)) if is_dataclass(method) else {}
            for name, value in settings.items():
                note("setting", value, name)
        note("seed", evidence.runtime.seed, "auditing")
        note("version", torch.__version__, "torch")
        note("version", platform.python_version(), "python")
        findings = _touched(evidence)
        if evidence.original is not None:
            moved = touched(evidence.original, evidence.unlearned)
            for name in moved[:NAMED]:
                note("touched parameter", name)
        return Outcome(tuple(findings), {"trace": tuple(rows)})


def ids_digest(ids: list[str]) -> str:
    """SHA-256 of sorted record ids."""
    return hashlib.sha256("\0".join(sorted(ids)).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all tensors of a model with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{plain.dtype}:{tuple(plain.shape)}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


def touched(before: nn.Module, after: nn.Module) -> list[str]:
    """Parameters that are new or not bit for bit as before, by the name that they have after.

    A wrapper's prefix does not count: a parameter of the same ending and value was not touched.
    """
    old = dict(before.named_parameters())
    moved: list[str] = []
    for name, tensor in after.named_parameters():
        same = [
            one
            for key, one in old.items()
            if (name == key or name.endswith(f".{key}")) and one.shape == tensor.shape
        ]
        if not any(torch.equal(one.detach().cpu(), tensor.detach().cpu()) for one in same):
            moved.append(name)
    return moved


def _touched(evidence: Evidence) -> list[Finding]:
    if evidence.original is None:
        return []
    moved = touched(evidence.original, evidence.unlearned)
    count = sum(1 for _ in evidence.unlearned.parameters())
    intention = evidence.method.card.intention if evidence.method is not None else "unknown"
    note = f"{len(moved)} of {count} parameter tensors; intention: {intention}"
    if intention == "removal" and not moved:
        note += "; removal is declared, yet no parameter was touched"
    return [Finding("trace", "tensors_touched", len(moved) / max(count, 1), n=count, note=note)]
