"""The figures that tables, searches and leaderboards show, under one name whatever the domain."""

from __future__ import annotations

from palimpsest.core.finding import Finding
from palimpsest.study.result import CellResult

FIGURES: dict[str, tuple[str, ...]] = {
    "forget": ("utility.forget_accuracy", "recall.forget_hit"),
    "retain": ("utility.retain_accuracy", "recall.retain_hit"),
    "test": ("utility.test_accuracy", "recall.test_hit"),
    "likelihood": ("recall.forget_probability",),
    "membership": ("membership.loss_auc", "text-membership.loss_auc"),
    "relearning": ("relearning.area",),
    "representation": ("representation.cka_to_original",),
}
"""Findings by name; the first that a report holds is meant."""
UTILITY = ("retain", "test")


def figure(cell: CellResult, name: str) -> Finding | None:
    """A figure of a cell, or None if none of its findings was measured."""
    found = (cell.finding(key) for key in FIGURES[name])
    return next((item for item in found if item is not None), None)


def value(cell: CellResult, name: str) -> float | None:
    """Its value."""
    found = figure(cell, name)
    return None if found is None else found.value


def gap(cell: CellResult, name: str) -> float | None:
    """Distance of a figure to the mean of the retrained controls, or None if it was not measured."""
    found = figure(cell, name)
    if found is None or found.value is None or found.control is None:
        return None
    return abs(found.value - found.control)


def audits_of_figures(task: str) -> dict[str, str]:
    """Audit that measures each figure for a task, for the figures that it has."""
    from palimpsest.core.auditing import AUDITS

    known = dict(AUDITS.items())
    chosen: dict[str, str] = {}
    for name, keys in FIGURES.items():
        for audit in (key.partition(".")[0] for key in keys):
            if audit in known and {"any", task} & set(known[audit].card.tasks):
                chosen.setdefault(name, audit)
    return chosen
