"""Requests in turn: how utility and verdict change over them, and what of the earlier ones comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.core.matrix import ScoreMatrix
from palimpsest.study.result import CellResult, Mean, StudyResult, mean_and_half_width

if TYPE_CHECKING:
    from rich.table import Table

TEST, FORGET = ("utility.test_accuracy", "recall.test_hit"), ("utility.forget_accuracy", "recall.forget_hit")
"""Findings of utility and of what is forgotten, of classifiers and of language models."""
WIDEST = 1.0
"""A K whose 95 % interval is wider cannot tell retrained from untouched, and its rise and fall is chance."""
HEADINGS = {
    "test first": "test accuracy after the first request",
    "test last": "test accuracy after the last request",
    "test slope": "change of test accuracy per request, of a straight line through all of them",
    "K in time": "knowledge K of the requests' records right after each request, mean where it is known well",
    "K at the end": "the same of all but the last request, after the last",
    "re-emergence": "largest rise of K of one request from its time to the end",
}


@dataclass(frozen=True)
class Turns:
    """A method over requests in turn.

    Attributes:
        label: As in tables.
        steps: Number of requests.
        first: Verdicts on the first request, right after it.
        first_again: Verdicts on the first request after the last.
        last: Verdicts on the last request.
        figures: Mean, half width of the 95 % interval and number over seeds, by heading of `HEADINGS`.
        failures: Reasons of cells that failed.
    """

    label: str
    steps: int
    first: dict[str, int]
    first_again: dict[str, int]
    last: dict[str, int]
    figures: dict[str, Mean]
    failures: tuple[str, ...]

    def words(self) -> tuple[str, str, str]:
        """The verdicts in words: first request, the same at the end, last request."""
        return _words(self.first), _words(self.first_again), _words(self.last)

    def shown(self) -> list[str]:
        """The figures in words, in the order of `HEADINGS`."""
        return [_shown(self.figures.get(heading)) for heading in HEADINGS]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "label": self.label, "steps": self.steps, "verdicts": {
                "first request": self.first, "first request, at the end": self.first_again,
                "last request": self.last,
            },
            **{
                heading: dict(zip(("mean", "half_width", "n"), mean, strict=True))
                for heading, mean in self.figures.items()
            },
            "failures": list(self.failures),
        }  # fmt: skip


def matrix(cells: Sequence[CellResult], finding: str, scaled: bool = True) -> ScoreMatrix:
    """A finding of one method and seed, step by request: at their time on the diagonal, at the end in the last row.

    Args:
        cells: Of one method and seed.
        finding: Its key ("utility.forget_accuracy").
        scaled: Whether K is taken instead of the value; NaN where its probe is invalid, or its interval wider
            than `WIDEST`.
    """
    done = [(cell, cell.report.facts) for cell in cells if cell.report is not None]
    order = {cell.request: facts["step"] for cell, facts in done if not facts["review"]}
    steps = 1 + max(order.values(), default=0)
    scores = np.full((steps, steps), np.nan)
    for cell, facts in done:
        found = _certain_k(cell, finding) if scaled else cell.value(finding)
        step = order.get(cell.request.removesuffix(", at the end"), facts["step"])
        scores[-1 if facts["review"] else step, step] = np.nan if found is None else found
    return ScoreMatrix(scores)


def _measured(cells: Sequence[CellResult], keys: Sequence[str]) -> str:
    """The first of several findings that any of the cells holds."""
    return next((key for key in keys if any(cell.finding(key) for cell in cells)), keys[0])


def _certain_k(cell: CellResult, finding: str) -> float | None:
    found = cell.finding(finding)
    if found is None or found.k is None or found.k_low is None or found.k_high is None:
        return None
    return found.k if found.k_high - found.k_low <= WIDEST else None


def turns_of(result: StudyResult) -> list[Turns]:
    """One entry per method, in the order of tables.

    K is that of the accuracy on the forgotten records.
    """
    groups: dict[str, dict[int, list[CellResult]]] = {}
    for cell in result.cells:
        groups.setdefault(cell.label, {}).setdefault(cell.seeds["training"], []).append(cell)
    return [_turns(label, list(seeds.values())) for label, seeds in groups.items()]


def in_turn(result: StudyResult) -> bool:
    """Whether a study's requests followed each other."""
    return any(report.facts.get("step", 0) > 0 for report in result.reports)


def turns_table(result: StudyResult) -> Table:
    """The entries of `turns_of` for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Requests in turn: from the first to the last", title_justify="left")
    for heading in ("method", "first request", "at the end", "last request"):
        table.add_column(heading)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for item in turns_of(result):
        table.add_row(escape(item.label), *item.words(), *item.shown())
    return table


def _turns(label: str, seeds: Sequence[Sequence[CellResult]]) -> Turns:
    said: dict[str, Counter[str]] = {"first": Counter(), "again": Counter(), "last": Counter()}
    figures: dict[str, list[float]] = {heading: [] for heading in HEADINGS}
    failures: list[str] = []
    steps = 0
    for cells in seeds:
        steps = len({cell.request for cell in cells if not cell.request.endswith(", at the end")})
        failures += [cell.reason for cell in cells if cell.status in ("failed", "crashed")]
        for cell in cells:
            if cell.report is None:
                continue
            step, review = cell.report.facts["step"], cell.report.facts["review"]
            place = "again" if review else {0: "first", steps - 1: "last"}.get(step)
            if place and (not review or cell.request.removesuffix(", at the end") == cells[0].request):
                said[place][cell.report.verdict.value] += 1
        test, knowledge = (
            matrix(cells, _measured(cells, TEST), scaled=False),
            matrix(cells, _measured(cells, FORGET)),
        )
        for heading, value in (
            ("test first", test.at_their_time[0]),
            ("test last", test.at_their_time[-1]),
            ("test slope", _slope(test.at_their_time)),
            ("K in time", _mean(knowledge.at_their_time)),
            ("K at the end", _mean(knowledge.at_the_end[:-1])),
            ("re-emergence", knowledge.re_emergence),
        ):
            if np.isfinite(value):
                figures[heading].append(float(value))
    means = {heading: mean_and_half_width(values) for heading, values in figures.items() if values}
    first, again, last = (dict(said[place]) for place in ("first", "again", "last"))
    return Turns(label, steps, first, again, last, means, tuple(failures))


def _mean(values: Any) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _slope(values: Any) -> float:
    known = np.flatnonzero(np.isfinite(values))
    return float(np.polyfit(known, values[known], 1)[0]) if len(known) > 1 else float("nan")


def _words(verdicts: dict[str, int]) -> str:
    return ", ".join(f"{word} {count}" if len(verdicts) > 1 else word for word, count in verdicts.items())


def _shown(mean: Mean | None) -> str:
    if mean is None:
        return ""
    return f"{mean[0]:.2f}" if mean[1] is None else f"{mean[0]:.2f} ±{mean[1]:.2f}"
