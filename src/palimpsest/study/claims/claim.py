"""A claim as data, and its judgement on the results of a study."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, model_validator

from palimpsest.study.request import Part

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq,
}  # fmt: skip


class Condition(Part):
    """A comparison of one measured figure with a number.

    Attributes:
        metric: A finding ("utility.test_accuracy"), its K ("k:relearning.area"), "seconds",
            "share_of_retraining", or a measurement of the claims package ("measure:ssd.zeroing-errors").
        minus: Label of a method whose figure (same request, same seed) is taken off first.
        op: How the figure compares with `value`.
        value: The bound.
    """

    metric: str
    minus: str | None = None
    op: Literal["<=", ">=", "<", ">", "=="]
    value: float

    @property
    def shown(self) -> str:
        """The figure in words."""
        name = self.metric.partition(":")[2] or self.metric
        return f"{name} - {self.minus}" if self.minus else name

    def excess(self, figure: float) -> float:
        """By how much a figure misses the bound; 0 or less if it does not."""
        if self.op in ("<=", "<"):
            return figure - self.value
        return self.value - figure if self.op in (">=", ">") else abs(figure - self.value)

    def holds(self, figure: float | None) -> bool:
        """Whether a figure is there and keeps the bound."""
        return figure is not None and OPERATORS[self.op](figure, self.value)


class Claim(Part):
    """A small, directional statement of a paper's result.

    It is judged for every request and seed of its study. Of `any_of`, `all_of` and `falling` at most one
    is given; without any, the figures are those of the original model.

    Attributes:
        name: Short.
        statement: What must hold here, in words.
        paper: What the paper (or a re-run of it) reports.
        study: Name of the study whose cells are looked at.
        any_of: Labels of methods of which one must keep all conditions.
        all_of: Labels of methods that all must keep them.
        falling: Labels in whose order `metric` must never rise.
        metric: See `falling`.
        conditions: What must hold.
        share: Least share of requests and seeds in which it must hold.
        note: What was tried, and why margins are as they are.
    """

    name: str
    statement: str
    paper: str
    study: str
    any_of: list[str] = Field(default_factory=list)
    all_of: list[str] = Field(default_factory=list)
    falling: list[str] = Field(default_factory=list)
    metric: str = ""
    conditions: list[Condition] = Field(default_factory=list[Condition])
    share: float = Field(default=1.0, gt=0, le=1)
    note: str = ""

    @model_validator(mode="after")
    def _one_kind(self) -> Claim:
        if sum(bool(labels) for labels in (self.any_of, self.all_of, self.falling)) > 1:
            raise ValueError("a claim has at most one of any_of, all_of, falling")
        if bool(self.falling) != bool(self.metric) or bool(self.falling) == bool(self.conditions):
            raise ValueError("a claim has conditions, or falling with a metric")
        return self

    @property
    def labels(self) -> list[str]:
        """Labels of all methods that it speaks of."""
        return self.any_of or self.all_of or self.falling or ["original"]


@dataclass(frozen=True)
class Unit:
    """A claim on one request with one seed.

    Attributes:
        request: In words.
        seed: Of training.
        label: The method that decided.
        figures: By name.
        held: Whether the claim held.
    """

    request: str
    seed: int
    label: str
    figures: dict[str, float | None]
    held: bool


@dataclass(frozen=True)
class Judged:
    """A claim, our figures and whether it holds."""

    claim: Claim
    units: tuple[Unit, ...]

    @property
    def held(self) -> int:
        """In how many units it held."""
        return sum(unit.held for unit in self.units)

    @property
    def passed(self) -> bool:
        """Whether it held in a large enough share of them."""
        return bool(self.units) and self.held >= self.claim.share * len(self.units) - 1e-9

    @property
    def ours(self) -> str:
        """Our figures over all units, in words: mean, and range where they differ."""
        names = list(dict.fromkeys(name for unit in self.units for name in unit.figures))
        shown = [names[0], names[-1]] if self.claim.falling else names
        said = [
            f"{_short(name)} {_spread([unit.figures.get(name) for unit in self.units])}" for name in shown
        ]
        return "; ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.claim.name,
            "statement": self.claim.statement,
            "paper": self.claim.paper,
            "note": self.claim.note,
            "ours": self.ours,
            "held": self.held,
            "units": len(self.units),
            "needed": self.claim.share,
            "passed": self.passed,
            "figures": [asdict(unit) for unit in self.units],
        }


Figure = Callable[[str, str], float | None]
"""From the label of a method and a metric to what was measured, for one request and one seed."""


def judge_unit(claim: Claim, request: str, seed: int, figure: Figure) -> Unit:
    """A claim on one request with one seed."""
    if claim.falling:
        series = [figure(label, claim.metric) for label in claim.falling]
        known = [value for value in series if value is not None]
        held = len(known) == len(series) and all(b <= a for a, b in pairwise(known))
        named = {
            f"{claim.metric} at {label}": value for label, value in zip(claim.falling, series, strict=True)
        }
        return Unit(request, seed, claim.falling[0], named, held)
    tried = [_try(claim.conditions, label, figure) for label in claim.labels]
    best, worst = min(tried, key=lambda item: item.excess), max(tried, key=lambda item: item.excess)
    kept = [item.held for item in tried]
    chosen = (next((item for item in tried if item.held), best)) if claim.any_of else worst
    return Unit(request, seed, chosen.label, chosen.figures, any(kept) if claim.any_of else all(kept))


@dataclass(frozen=True)
class _Try:
    label: str
    figures: dict[str, float | None]
    held: bool
    excess: float


def _try(conditions: Sequence[Condition], label: str, figure: Figure) -> _Try:
    figures: dict[str, float | None] = {}
    held, excess = True, -math.inf
    for condition in conditions:
        value = figure(label, condition.metric)
        base = figure(condition.minus, condition.metric) if condition.minus else 0.0
        measured = None if value is None or base is None else value - base
        figures[condition.shown] = measured
        held = held and condition.holds(measured)
        excess = max(excess, math.inf if measured is None else condition.excess(measured))
    return _Try(label, figures, held, excess)


def _short(name: str) -> str:
    """A figure's name without its audit."""
    metric, space, rest = name.partition(" ")
    return f"{metric.rpartition('.')[2].replace('_', ' ')}{space}{rest}"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not measured"
    low, high = min(known), max(known)
    if low == high:
        return f"{low:.3g}"
    return f"{fmean(known):.3g} ({low:.3g} to {high:.3g})"
