"""Figures that claims on continual learning are judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from palimpsest.core.errors import InvalidRecipe
from palimpsest.retain.running import Run
from palimpsest.study.claims.learned import LEARNED, Learned
from palimpsest.study.retain.recipe import RetainRecipe
from palimpsest.study.retain.result import RetainCell, RetainResult
from palimpsest.study.retain.workshop import RetainWorkshop

Cells = Mapping[tuple[str, str, int], RetainCell]


class RetainStudied:
    """A study that was run, and the figures that can be read off it.

    A metric is a measure ("accuracy", "forgetting", "min-ACC", ...), or one of:

    - "newest", "first", "earlier": accuracy at the end on the newest and on the first task, and its mean over
      all but the newest;
    - "when-new": mean accuracy on every task but the first right after it was learned;
    - "records": training records over all experiences;
    - "start:4-6": mean accuracy on tasks 4 to 6 at the first evaluation while each was learned;
    - "lowest:1:30": lowest accuracy of task 1 in the first 30 steps of the experience after it;
    - "gradients:first": least ratio of plasticity to stability at the first step of an experience that has both,
      "gradients:last:5": the largest over the last 5 steps of one; "gradients:held": the largest norm of stability
      at such a first step;
    - any of them with "@STREAM": on another stream of the study, with the same seed;
    - "gain:accuracy@STREAM": there minus here;
    - "drop:accuracy@ONE vs OTHER", "share:records@ONE vs OTHER": one stream minus, or over, another; with
      " of LABEL" at the end the other figure is that of another method;
    - "start:4-6 minus start:1-3": two figures of one cell;
    - "accuracy-over-minimum", "accuracy-over-worst-case": accuracy at the end minus min-ACC, minus WC-ACC;
    - "hidden-by-task-ends": min-ACC from the accuracy matrix alone, minus min-ACC;
    - "measure:slug.name": a measurement of the claims package, on the method as it learns the stream again.

    Args:
        result: What came of the study.
        recipe: Of the study, where measurements are asked for.
    """

    def __init__(self, result: RetainResult, recipe: RetainRecipe | None = None):
        self.result, self.recipe = result, recipe
        self._workshop: RetainWorkshop | None = None
        self._learned: dict[tuple[str, str, int], Learned] = {}
        self._measured: dict[tuple[str, str, int, str], float] = {}
        self.cells = {(cell.stream, cell.label, cell.seed): cell for cell in result.cells}

    def units(self) -> dict[tuple[str, int], Callable[[str, str], float | None]]:
        """The figures of every stream and seed."""
        keys = dict.fromkeys((cell.stream, cell.seed) for cell in self.result.cells)
        return {key: partial(self.figure, *key) for key in keys}

    def once(self) -> dict[tuple[str, int], Callable[[str, str], float | None]]:
        """The figures of every seed on the first stream: for claims that name the streams they compare."""
        first = self.result.cells[0].stream
        return {key: figure for key, figure in self.units().items() if key[0] == first}

    def figure(self, stream: str, seed: int, label: str, metric: str) -> float | None:
        """A figure of a method on a stream with a seed; None if it was not measured."""
        kind, colon, rest = metric.partition(":")
        if colon and kind in ("gain", "drop", "share"):
            return self._compared(stream, seed, label, kind, rest)
        name, at, other = metric.partition("@")
        cell = self.cells.get((other if at else stream, label, seed))
        if cell is None or cell.status != "done":
            return None
        if colon and kind == "measure":
            return self._measure(cell, name.partition(":")[2])
        return figure_of(cell, name)

    def _measure(self, cell: RetainCell, name: str) -> float:
        """A measurement of the claims package; each is made once."""
        key = (cell.stream, cell.label, cell.seed)
        if (*key, name) not in self._measured:
            if key not in self._learned:
                self._learned = {key: Learned(partial(self._run, *key))}
            self._measured[*key, name] = LEARNED.get(name)(self._learned[key])
        return self._measured[*key, name]

    def _run(self, stream: str, label: str, seed: int) -> Run:
        if self.recipe is None:
            raise InvalidRecipe("Measurements need the recipe of the study.")
        titles = [method.title for method in self.recipe.methods]
        self._workshop = self._workshop or RetainWorkshop(self.recipe)
        return self._workshop.run(self.recipe.streams.index(stream), titles.index(label), seed)

    def _compared(self, stream: str, seed: int, label: str, kind: str, what: str) -> float | None:
        """Two figures against each other, as the prefix of a metric says."""
        name, _, places = what.partition("@")
        if kind == "gain":
            one, other, base = places, stream, label
        else:
            one, _, other = places.partition(" vs ")
            other, _, base = other.partition(" of ")
        first, second = (
            self.figure(one, seed, label, name),
            self.figure(other, seed, base or label, name),
        )
        if first is None or second is None:
            return None
        return first / second if kind == "share" else first - second


def figure_of(cell: RetainCell, name: str) -> float | None:
    """A figure of a cell that is done.

    Raises:
        InvalidRecipe: If a metric cannot be read.
    """
    if " minus " in name:
        ends = [figure_of(cell, part) for part in name.split(" minus ", 1)]
        return None if ends[0] is None or ends[1] is None else ends[0] - ends[1]
    outcome = cell.outcome
    kind, _, rest = name.partition(":")
    if name in ("accuracy-over-minimum", "accuracy-over-worst-case"):
        lowest = cell.measure("min-ACC" if name.endswith("minimum") else "WC-ACC")
        accuracy = cell.measure("accuracy")
        return None if lowest is None or accuracy is None else accuracy - lowest
    if name == "hidden-by-task-ends":
        lowest = cell.measure("min-ACC")
        return None if lowest is None else _minimum_of_matrix(outcome["matrix"]) - lowest
    try:
        if kind == "newest":
            return outcome["matrix"][-1][-1]
        if kind == "first":
            return outcome["matrix"][-1][0]
        if kind == "earlier":
            return float(np.mean(outcome["matrix"][-1][:-1])) if len(outcome["matrix"]) > 1 else None
        if kind == "when-new":
            rows = outcome["matrix"]
            return float(np.mean([rows[at][at] for at in range(1, len(rows))])) if len(rows) > 1 else None
        if kind == "records":
            return float(sum(outcome["records"]))
        if kind == "start":
            first, _, last = rest.partition("-")
            return _start(cell, int(first) - 1, int(last or first) - 1)
        if kind == "gradients":
            what, _, steps = rest.partition(":")
            return _gradients(cell, what, int(steps or 1))
        if kind == "lowest":
            task, _, steps = rest.partition(":")
            return _lowest(cell, int(task) - 1, int(steps))
    except ValueError as problem:
        raise InvalidRecipe(f"Cannot read the metric '{name}' of a claim: {problem}.") from problem
    return cell.measure(name)


def _start(cell: RetainCell, first: int, last: int) -> float | None:
    """Mean over tasks of the first evaluation while each was learned."""
    history = cell.outcome["history"]
    found: dict[int, float] = {}
    for now, row in zip(history["learning"], history["accuracy"], strict=True):
        if first <= now <= last:
            found.setdefault(now, row[now])
    return float(np.mean(list(found.values()))) if len(found) == last - first + 1 else None


def _lowest(cell: RetainCell, task: int, steps: int) -> float | None:
    """Lowest accuracy of a task in the first steps of the experience after it."""
    history = cell.outcome["history"]
    rows = list(zip(history["steps"], history["learning"], history["accuracy"], strict=True))
    begin = max((step for step, now, _ in rows if now == task), default=0)
    values = [row[task] for step, now, row in rows if now == task + 1 and step <= begin + steps]
    return min(values) if values else None


def _gradients(cell: RetainCell, what: str, steps: int) -> float | None:
    """A figure of the norms of plasticity and stability; norms are added up over several steps.

    Raises:
        ValueError: For an unknown figure.
    """
    found = cell.outcome.get("gradients")
    if not found or not found["steps"]:
        return None
    norms: dict[int, list[tuple[float, float]]] = {}
    for now, new, held in zip(found["learning"], found["plasticity"], found["stability"], strict=True):
        norms.setdefault(now, []).append((new, held))
    later = [rows for now, rows in norms.items() if now > 0]
    if not later:
        return None
    if what == "held":
        return max(rows[0][1] for rows in later)
    ratios = [_ratio(rows[:1] if what == "first" else rows[-steps:]) for rows in later]
    if what == "first":
        return min(ratios)
    if what == "last":
        return max(ratios)
    raise ValueError(f"gradients are 'first', 'last:STEPS' or 'held', not '{what}'")


def _ratio(rows: Sequence[tuple[float, float]]) -> float:
    held = sum(norm for _, norm in rows)
    return sum(norm for norm, _ in rows) / held if held else float("inf")


def _minimum_of_matrix(matrix: list[list[float]]) -> float:
    """min-ACC of evaluations after experiences alone."""
    tasks = len(matrix)
    return float(
        np.mean([min(matrix[step][task] for step in range(task + 1, tasks)) for task in range(tasks - 1)])
    )
