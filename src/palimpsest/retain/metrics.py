"""Metrics of continual evaluation: what the accuracy at the end of tasks does not show.

"Continual evaluation for lifelong learning: Identifying the stability gap" (De Lange, van de Ven,
Tuytelaars, ICLR 2023, arXiv 2205.13452). Metrics of the accuracy matrix (ACC, BWT, FWT, forgetting) are in
`core.matrix`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from palimpsest.core.errors import InvalidAudit
from palimpsest.core.intervals import clopper_pearson
from palimpsest.core.matrix import ScoreMatrix


@dataclass(frozen=True)
class History:
    """Accuracy on every task met, evaluation by evaluation.

    Attributes:
        learning: Task in training at each evaluation, from 0, never falling.
        accuracy: At each evaluation, the accuracies of the tasks 0 to the one in training.
        steps: Optimiser steps before each evaluation.
        sizes: Test records of each task.

    Raises:
        InvalidAudit: If lengths do not fit, or an accuracy lies outside [0, 1].
    """

    learning: tuple[int, ...]
    accuracy: tuple[tuple[float, ...], ...]
    steps: tuple[int, ...] = ()
    sizes: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if len(self.learning) != len(self.accuracy) or (self.steps and len(self.steps) != len(self.learning)):
            raise InvalidAudit(
                f"{len(self.learning)} tasks in training for {len(self.accuracy)} evaluations."
            )
        for number, (task, row) in enumerate(zip(self.learning, self.accuracy, strict=True)):
            if len(row) < task + 1:
                raise InvalidAudit(
                    f"Evaluation {number} has {len(row)} accuracies; {task + 1} tasks were met by then."
                )
            if not all(0 <= value <= 1 for value in row):
                raise InvalidAudit(f"Evaluation {number} holds accuracies outside [0, 1]: {row}.")

    @property
    def tasks(self) -> int:
        """Tasks met so far."""
        return max(self.learning, default=-1) + 1

    def of_task(self, task: int) -> tuple[Float[NDArray[np.float64], " evaluations"], NDArray[np.int64]]:
        """Accuracies of a task since it was met, and the task that was in training at each."""
        rows = [
            (row[task], now) for row, now in zip(self.accuracy, self.learning, strict=True) if now >= task
        ]
        return np.array([value for value, _ in rows]), np.array([now for _, now in rows], np.int64)

    def up_to(self, evaluations: int) -> History:
        """The first evaluations only."""
        return History(
            self.learning[:evaluations], self.accuracy[:evaluations], self.steps[:evaluations], self.sizes
        )


def minimum_accuracies(history: History) -> dict[int, float]:
    """Lowest accuracy of every earlier task since its own training ended; tasks without one are left out."""
    found: dict[int, float] = {}
    for task in range(history.tasks - 1):
        values, now = history.of_task(task)
        if (now > task).any():
            found[task] = float(values[now > task].min())
    return found


def minimum_accuracy(history: History) -> float | None:
    """min-ACC: mean over the earlier tasks of `minimum_accuracies`; None while there is no earlier task.

    Evaluations made while a task itself is trained do not count, nor does the one right after.
    """
    found = minimum_accuracies(history)
    return float(np.mean(list(found.values()))) if found else None


def worst_case_accuracy(history: History) -> float:
    """WC-ACC: A_k / k + (1 - 1/k) min-ACC, the accuracy of the current task k and the worst of the others.

    Raises:
        InvalidAudit: Before any evaluation.
    """
    if not history.learning:
        raise InvalidAudit("There is no worst case before the first evaluation.")
    current, lowest = history.accuracy[-1][history.learning[-1]], minimum_accuracy(history)
    tasks = history.tasks
    return current if lowest is None else current / tasks + (1 - 1 / tasks) * lowest


def largest_drop(values: Float[NDArray[np.float64], " evaluations"]) -> float:
    """Largest values[m] - values[n] with m < n; negative if they only rise, 0 for a single value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return 0.0
    return float((np.maximum.accumulate(values)[:-1] - values[1:]).max())


def largest_rise(values: Float[NDArray[np.float64], " evaluations"], as_released: bool = False) -> float:
    """Largest values[n] - values[m] with m < n; negative if they only fall, 0 for a single value.

    Args:
        values: In the order of evaluation.
        as_released: Leave out starts below an earlier value, as the released code does (right for drops,
            wrong for rises: 0.5, 0.1, 0.9 gives 0.4 instead of 0.8).
    """
    if not as_released:
        return largest_drop(-np.asarray(values, float))
    values = np.asarray(values, float)
    if len(values) < 2:
        return 0.0
    starts = np.flatnonzero(values[:-1] >= np.maximum.accumulate(values)[:-1])
    return float(max((values[start + 1 :] - values[start]).max() for start in starts))


def windowed(
    history: History, window: int, *, plasticity: bool = False, as_released: bool = False
) -> dict[int, float]:
    """Largest drop (or rise) of each task within any `window` evaluations in a row, at least 0.

    A task's whole life counts, its own training included. Windows count evaluations, not steps.

    Raises:
        InvalidAudit: For a window below 2.
    """
    if window < 2:
        raise InvalidAudit(f"A window holds at least 2 evaluations, not {window}.")
    found: dict[int, float] = {}
    for task in range(history.tasks):
        values, _ = history.of_task(task)
        if as_released and plasticity:
            parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
            found[task] = max(0.0, *(largest_rise(part, True) for part in parts))
        else:
            found[task] = _within(-values if plasticity else values, window)
    return found


def windowed_forgetting(history: History, window: int = 10) -> float:
    """WF^w: mean over tasks of the largest drop within w evaluations."""
    return _mean(windowed(history, window))


def windowed_plasticity(history: History, window: int = 10) -> float:
    """WP^w: mean over tasks of the largest rise within w evaluations."""
    return _mean(windowed(history, window, plasticity=True))


def learning_curve_area(history: History, first: int = 10) -> float | None:
    """LCA: mean over tasks of the mean of the `first` evaluations during their own training.

    Tasks with fewer are left out; None if all are.

    Raises:
        InvalidAudit: For fewer than one evaluation.
    """
    if first < 1:
        raise InvalidAudit(f"The area under the learning curve needs at least 1 evaluation, not {first}.")
    areas: list[float] = []
    for task in range(history.tasks):
        values, now = history.of_task(task)
        own = values[now == task][:first]
        if len(own) == first:
            areas.append(float(own.mean()))
    return float(np.mean(areas)) if areas else None


def average_accuracy(history: History) -> float:
    """ACC: mean accuracy of all tasks at the last evaluation.

    Raises:
        InvalidAudit: Before any evaluation.
    """
    if not history.learning:
        raise InvalidAudit("There is no accuracy before the first evaluation.")
    return float(np.mean(history.accuracy[-1][: history.tasks]))


def forgetting_so_far(matrix: ScoreMatrix) -> Float[NDArray[np.float64], "steps items"]:
    """What each earlier task has lost since its own step, after every step: R[j][j] - R[t][j] for t > j, else 0."""
    return np.tril(matrix.at_their_time - matrix.scores, -1)


def forgetting_with_last(matrix: ScoreMatrix) -> float:
    """Mean drop of the earlier tasks from their best score, the last step among the candidates: at least 0.

    The forgetting of Mammoth and of several online papers; `ScoreMatrix.forgetting` leaves the last step out.
    """
    items = matrix.scores.shape[1]
    best = [np.nanmax(matrix.scores[item:, item]) for item in range(items - 1)]
    return float(np.mean(np.array(best) - matrix.at_the_end[:-1])) if items > 1 else float("nan")


def drop_from_best(matrix: ScoreMatrix) -> float:
    """Mean over all tasks, the newest too, of best score at any step - score at the end: at least 0.

    The forgetting of several online papers (ASER, SCR, PCR).
    """
    return float(np.mean(np.nanmax(matrix.scores, 0) - matrix.at_the_end))


def global_forgetting(matrix: ScoreMatrix, sizes: Sequence[int]) -> float:
    """F^G of "A Closer Look at Rehearsal-Free Continual Learning" (arXiv 2203.17269); positive is forgetting.

    1/(N-1) sum over i >= 2 and n < i of |T_n| / |T_1..i| (R[n,n] - R[i,n]), with R[i,n] the accuracy on task n
    after task i with answers among the classes of the tasks 1 to n (see `retain.following`).

    Args:
        matrix: R.
        sizes: Classes of each task.

    Raises:
        InvalidAudit: If the sizes do not fit the matrix.
    """
    tasks = matrix.scores.shape[1]
    if len(sizes) != tasks or min(sizes, default=0) < 1:
        raise InvalidAudit(
            f"{tasks} tasks need as many numbers of classes, each at least 1; not {list(sizes)}."
        )
    if tasks < 2:
        return float("nan")
    share = np.asarray(sizes, float)[None, :] / np.cumsum(sizes)[:, None]
    lost = matrix.at_their_time[None, :] - matrix.scores[:tasks]
    later = np.tril_indices(tasks, -1)
    return float((share * lost)[later].sum() / (tasks - 1))


def local_forgetting(matrix: ScoreMatrix) -> float:
    """F^L of arXiv 2203.17269: 1/(N-1) sum over n < N of A[n,n] - A[N,n]; positive is forgetting.

    A[i,n] is the accuracy on task n after task i with answers among its own classes alone.
    """
    return -matrix.backward_transfer


def forgetting_by_steps(matrix: ScoreMatrix) -> float:
    """The forgetting of the CODA-Prompt repository: mean over steps of the mean loss since the step before.

    1/(N-1) sum over t >= 2 and i < t of (y[t-1,i] - y[t,i]) / (t-1). It compares with the previous step, not
    with a task's own as the papers' formulas do.
    """
    tasks = matrix.scores.shape[1]
    if tasks < 2:
        return float("nan")
    scores = matrix.scores
    return float(np.mean([(scores[t - 1, :t] - scores[t, :t]).mean() for t in range(1, tasks)]))


def positive_backward_transfer(matrix: ScoreMatrix) -> float:
    """BWT+ (Diaz-Rodriguez et al., 2018): mean over all later steps of the change of each task, at least 0."""
    change = np.tril(matrix.scores - matrix.at_their_time, -1)
    pairs = len(change) * (len(change) - 1) / 2
    return max(0.0, float(change.sum() / pairs)) if pairs else float("nan")


def upper_mean(matrix: ScoreMatrix) -> float:
    """Mean score on tasks before their own step: the FWT of Diaz-Rodriguez et al. (2018)."""
    above = matrix.scores[np.triu_indices_from(matrix.scores, 1)]
    return float(above.mean()) if len(above) else float("nan")


def sampling_intervals(
    history: History, confidence: float = 0.95, windows: Sequence[int] = (10, 100)
) -> dict[str, tuple[float, float]]:
    """What the metrics of a subsampled evaluation may be on all records of which its own are a draw.

    Every accuracy that a metric looks at gets an exact interval, wide enough (Bonferroni) that all of them hold
    together with this confidence; the metric's interval is then what it is for the lower and for the upper ends.
    That covers the choice of the lowest of many evaluations, or of the two that are furthest apart in a window, and
    is wide where there are many. Empty without evaluations or sizes.
    """
    if not history.learning or len(history.sizes) < history.tasks:
        return {}
    tasks, last = history.tasks, history.learning[-1]

    def ends(accuracy: float, task: int, looked_at: int) -> NDArray[np.float64]:
        size = history.sizes[task]
        apart = 1 - (1 - confidence) / looked_at
        return np.array(clopper_pearson(round(accuracy * size), size, apart))

    final = [ends(history.accuracy[-1][task], task, tasks) for task in range(tasks)]
    found = {"ACC": np.mean(final, 0)}
    lowest = minimum_accuracies(history)
    later = sum(int((history.of_task(task)[1] > task).sum()) for task in lowest)
    if lowest:
        minima = [ends(value, task, later) for task, value in lowest.items()]
        found["min-ACC"] = np.mean(minima, 0)
        shared = [ends(value, task, later + 1) for task, value in lowest.items()]
        current = ends(history.accuracy[-1][last], last, later + 1)
        found["WC-ACC"] = current / tasks + (1 - 1 / tasks) * np.mean(shared, 0)
    else:
        found["WC-ACC"] = ends(history.accuracy[-1][last], last, 1)
    lives = [history.of_task(task)[0] for task in range(tasks)]
    every = sum(len(life) for life in lives)
    reach: list[NDArray[np.float64]] = []
    for task, life in enumerate(lives):
        distinct, of = np.unique(life, return_inverse=True)
        reach.append(np.array([ends(value, task, every) for value in distinct])[of].T)
    for window in windows:
        found[f"WF{window}"] = np.mean(
            [(_within(low, window, high), _within(high, window, low)) for low, high in reach], 0
        )
        found[f"WP{window}"] = np.mean(
            [(_within(-high, window, -low), _within(-low, window, -high)) for low, high in reach], 0
        )
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def accuracy_interval(accuracy: float, size: int) -> tuple[float, float]:
    """Exact 95 % interval of an accuracy measured on `size` records."""
    return clopper_pearson(round(accuracy * size), size)


def summary(history: History, windows: Sequence[int] = (10, 100), first: int = 10) -> dict[str, float | None]:
    """All metrics of a run by name; empty without evaluations."""
    if not history.learning:
        return {}
    found: dict[str, float | None] = {
        "ACC": average_accuracy(history),
        "min-ACC": minimum_accuracy(history),
        "WC-ACC": worst_case_accuracy(history),
    }
    for window in windows:
        found[f"WF{window}"] = windowed_forgetting(history, window)
        found[f"WP{window}"] = windowed_plasticity(history, window)
    return found | {f"LCA{first}": learning_curve_area(history, first)}


def _within(values: NDArray[np.float64], window: int, fallen: NDArray[np.float64] | None = None) -> float:
    """Largest drop within any `window` values in a row, at least 0; `fallen` is what the later ones drop to."""
    later = values if fallen is None else fallen
    drop = 0.0
    for gap in range(1, min(window, len(values))):
        drop = max(drop, float((values[:-gap] - later[gap:]).max()))
    return drop


def _mean(values: dict[int, float]) -> float:
    if not values:
        raise InvalidAudit("There is nothing to average before the first evaluation.")
    return float(np.mean(list(values.values())))
