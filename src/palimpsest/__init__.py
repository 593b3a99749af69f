"""Palimpsest: make trained models forget, retain, and prove it.

The public face; everything is imported at first use, so that `import palimpsest` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from palimpsest import tasks
    from palimpsest.audit._apply import audit
    from palimpsest.audit.report import AuditReport
    from palimpsest.core.auditing import audit as auditor
    from palimpsest.core.errors import PalimpsestError
    from palimpsest.core.evidence import Evidence
    from palimpsest.core.finding import Finding, Outcome
    from palimpsest.core.needs import Need
    from palimpsest.core.records import Records
    from palimpsest.core.runtime import Runtime
    from palimpsest.core.selection import Selection, by_column, by_fraction, by_ids, by_range
    from palimpsest.core.split import ForgetSplit, split
    from palimpsest.core.unlearner import Paper, unlearner
    from palimpsest.data import load_data
    from palimpsest.forget._apply import forget
    from palimpsest.models import build_model
    from palimpsest.parts.checkpoint import load_model, save_model
    from palimpsest.parts.training import TrainingRecipe, train
    from palimpsest.study.compare import compare
    from palimpsest.study.worst_case.search import worst_case

_PLACES = {
    "tasks": "palimpsest.tasks",
    "forget": "palimpsest.forget",
    "audit": "palimpsest.audit",
    "AuditReport": "palimpsest.audit.report:AuditReport",
    "auditor": "palimpsest.core.auditing:audit",
    "PalimpsestError": "palimpsest.core.errors:PalimpsestError",
    "Evidence": "palimpsest.core.evidence:Evidence",
    "Finding": "palimpsest.core.finding:Finding",
    "Outcome": "palimpsest.core.finding:Outcome",
    "Need": "palimpsest.core.needs:Need",
    "Records": "palimpsest.core.records:Records",
    "Runtime": "palimpsest.core.runtime:Runtime",
    "Selection": "palimpsest.core.selection:Selection",
    "by_column": "palimpsest.core.selection:by_column",
    "by_fraction": "palimpsest.core.selection:by_fraction",
    "by_ids": "palimpsest.core.selection:by_ids",
    "by_range": "palimpsest.core.selection:by_range",
    "ForgetSplit": "palimpsest.core.split:ForgetSplit",
    "split": "palimpsest.core.split:split",
    "Paper": "palimpsest.core.unlearner:Paper",
    "unlearner": "palimpsest.core.unlearner:unlearner",
    "load_data": "palimpsest.data:load_data",
    "build_model": "palimpsest.models:build_model",
    "load_model": "palimpsest.parts.checkpoint:load_model",
    "save_model": "palimpsest.parts.checkpoint:save_model",
    "TrainingRecipe": "palimpsest.parts.training:TrainingRecipe",
    "train": "palimpsest.parts.training:train",
    "compare": "palimpsest.study.compare:compare",
    "worst_case": "palimpsest.study.worst_case.search:worst_case",
}

__all__ = ["__version__", *_PLACES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'palimpsest' has no attribute '{name}'")
    module, _, attribute = _PLACES[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted(__all__)
