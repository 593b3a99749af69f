"""Recurrence: earlier tasks come back in later experiences, the oftener the more recent they are.

"Catastrophic Interference is Mitigated in Naturalistic Power-Law Learning Environments" (arXiv 2401.10393):
in nature the chance of meeting a task again falls as a power law of the time since it was last met. The
environment, not the learner, rehearses: experience i holds C[j, i] records of every earlier task j, drawn
from all of its records.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from palimpsest.core.errors import InvalidStream
from palimpsest.retain.streams import Experience, Stream
from palimpsest.retain.transforms import joined

Law = Literal["sequential", "uniform", "exponential", "power", "lag-power", "free-power", "full"]
LAWS: tuple[Law, ...] = ("sequential", "uniform", "exponential", "power", "lag-power", "free-power", "full")
BUDGETED: tuple[Law, ...] = ("uniform", "exponential", "power", "lag-power")

PUBLISHED = (57927, 33969, 20867, 13329, 8802, 5981, 4167, 2968, 2155, 1592)
"""Records at lag 0 to 9 in the published experiments: `free_power` read off with an error of up to one record."""


@dataclass(frozen=True)
class Recurrence:
    """How often earlier tasks come back.

    Attributes:
        law: "sequential" (never), "full" (all of them), "free-power" (n ((20 + 2k) / 20)^-5.6 records at lag
            k, whatever that costs), or with a budget of floor(fraction * n) records per experience:
            "uniform", "exponential" (exp(-k / b) / b), "power" (a (0.01 (10 + j))^(a - 1) for task j, the
            preset of the published experiments, which counts from the beginning of the stream), "lag-power"
            ((k + offset)^-exponent, the paper's words taken literally).
        fraction: Budget as a share of the new task's records, in (0, 1].
        a: Of "power", above 2.
        b: Of "exponential", above 0.
        offset: Of "lag-power", above -1.
        exponent: Of "lag-power", above 0.

    Raises:
        InvalidStream: For an unknown law, or a value out of its range.
    """

    law: Law = "power"
    fraction: float = 0.25
    a: float = 5.0
    b: float = 1.0
    offset: float = 0.0
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise InvalidStream(f"The law must be one of {', '.join(LAWS)}, not {self.law!r}.")
        if self.law in BUDGETED and not 0 < self.fraction <= 1:
            raise InvalidStream(f"The fraction of rehearsal must lie in (0, 1], not {self.fraction}.")
        if self.a <= 2 or self.b <= 0 or self.offset <= -1 or self.exponent <= 0:
            raise InvalidStream(f"a must be above 2, b above 0, offset above -1, exponent above 0: {self}.")


def counts(tasks: int, new: int, recurrence: Recurrence) -> Int[NDArray[np.int64], "tasks experiences"]:
    """Records of every task (row) in every experience (column): `new` on the diagonal, none below it.

    Counts are cut to whole numbers, and with a budget the share per unit of weight is too, as in the
    published experiments; so the budget is never used up entirely.

    Raises:
        InvalidStream: For fewer than 2 tasks or no records.

    Example:
        >>> counts(4, 1000, Recurrence("uniform", 0.5)).tolist()
        [[1000, 500, 250, 166], [0, 1000, 250, 166], [0, 0, 1000, 166], [0, 0, 0, 1000]]
    """
    if tasks < 2 or new < 1:
        raise InvalidStream(f"Recurrence needs at least 2 tasks and 1 record, not {tasks} and {new}.")
    table = np.zeros((tasks, tasks), np.int64)
    for step in range(tasks):
        table[step, step] = new
        if step:
            table[:step, step] = _returning(step, new, recurrence)
    return table


def free_power(lag: int) -> float:
    """57927 ((20 + 2k) / 20)^-5.6: records at lag k of the law without a budget, for 57,927 new ones."""
    return PUBLISHED[0] * ((20 + 2 * lag) / 20) ** -5.6


def _returning(step: int, new: int, recurrence: Recurrence) -> NDArray[np.int64]:
    """Records of the tasks 0 to step - 1 in experience `step`."""
    law, task = recurrence.law, np.arange(step)
    lag = step - task
    if law == "sequential":
        return np.zeros(step, np.int64)
    if law == "full":
        return np.full(step, new, np.int64)
    if law == "free-power":
        listed = np.array([PUBLISHED[k] if k < len(PUBLISHED) else free_power(k) for k in lag.tolist()])
        return np.floor(new * listed / PUBLISHED[0]).astype(np.int64)
    budget = int(np.floor(new * recurrence.fraction))
    if law == "uniform":
        return np.full(step, budget // step, np.int64)
    if law == "exponential":
        weight = np.exp(-lag / recurrence.b) / recurrence.b
    elif law == "power":
        weight = recurrence.a * (0.01 * (10 + task)) ** (recurrence.a - 1)
    else:
        weight = (lag + recurrence.offset) ** -recurrence.exponent
    return (np.floor(budget / weight.sum()) * weight).astype(np.int64)


def recurring(stream: Stream, recurrence: Recurrence, seed: int = 0) -> Stream:
    """A stream in which earlier tasks return by a law; tests stay those of the new task.

    Records are drawn without replacement from all training records of their task. Every task counts as one
    of n records, n those of the smallest task, of which all are met when it is new; a larger task is cut to
    n too, so that the law is the same for all.

    Raises:
        InvalidStream: For a stream of one experience.
    """
    smallest = min(len(experience.records) for experience in stream)
    table = counts(len(stream), smallest, recurrence)
    if recurrence.law in BUDGETED and (table[np.triu_indices(len(stream), 1)] == 0).any():
        warnings.warn(
            f"A budget of {recurrence.fraction:g} of {smallest} records is too small for {len(stream)} tasks: some do "
            "not come back at all.",
            stacklevel=2,
        )
    random = np.random.default_rng(seed)
    experiences = tuple(
        _mixed(stream, experience, table[:, experience.index].tolist(), random) for experience in stream
    )
    return replace(
        stream,
        experiences=experiences,
        returning=True,
        name=f"{stream.name}, {recurrence.law} recurrence",
    )


def _mixed(stream: Stream, new: Experience, shares: Sequence[int], random: np.random.Generator) -> Experience:
    parts = [
        stream[task].records.select(np.sort(random.permutation(len(stream[task].records))[:share]))
        for task, share in enumerate(shares)
        if share
    ]
    records = joined(parts)
    classes = tuple(int(label) for label in np.unique(records.column("label")))
    return replace(new, records=records, classes=classes)
