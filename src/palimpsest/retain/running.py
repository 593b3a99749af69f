"""Running a learner over a stream: observe, evaluate, and stop or go on between any two experiences."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from palimpsest.core.matrix import ScoreMatrix
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task
from palimpsest.parts.reinitialise import check_finite
from palimpsest.retain.evaluation import ContinualEvaluation, TestSet
from palimpsest.retain.forces import Forces
from palimpsest.retain.learner import Keeps, Learner, build_learner
from palimpsest.retain.metrics import History, sampling_intervals, summary
from palimpsest.retain.streams import Stream
from palimpsest.retain.student import Student, Training, online
from palimpsest.tasks.classification import Classification


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        matrix: Accuracy on every task (column) after every experience (row). Tasks that were not met yet
            are NaN in class-incremental streams, where no answer could be right.
        sizes: Test records of each task.
        untrained: Accuracy of the fresh network on each task; NaN likewise.
        history: Of the continual evaluation; empty if there was none.
        seconds: Of learning, by experience, without evaluation at its end.
        kept_bytes: Memory of what the learner keeps beside its network, by experience; of earlier records as a
            whole where it learns them again (joint), if they lie in memory.
        steps: Optimiser steps.
        gradients: Norms of plasticity and stability by step, in columns (`Forces.to_dict`); empty unless asked for.
        learner: As it is now.
    """

    matrix: ScoreMatrix
    sizes: tuple[int, ...]
    untrained: tuple[float, ...]
    history: History
    seconds: tuple[float, ...]
    kept_bytes: tuple[int, ...]
    steps: int
    gradients: Mapping[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    learner: Learner | None = field(default=None, repr=False, compare=False)

    @property
    def average_incremental(self) -> float:
        """Mean over experiences of the mean accuracy on the tasks met by then."""
        scores = self.matrix.scores
        return float(np.mean([scores[step, : step + 1].mean() for step in range(len(scores))]))

    def measures(self) -> dict[str, float | None]:
        """All figures by name, a learner's own (its attribute `figures`) among them; None where undefined."""
        found: dict[str, float | None] = {
            "accuracy": self.matrix.average,
            "average incremental accuracy": self.average_incremental,
            "forgetting": self.matrix.forgetting,
            "BWT": self.matrix.backward_transfer,
            "FWT": self.matrix.forward_transfer(np.asarray(self.untrained)),
            "seconds": sum(self.seconds),
            "kept bytes": float(self.kept_bytes[-1]),
            "steps": float(self.steps),
        }
        while_learning = summary(self.history)
        found |= {name: value for name, value in while_learning.items() if name != "ACC"}
        own: Mapping[str, float] = getattr(self.learner, "figures", {})
        found |= own
        return {
            name: value if value is not None and np.isfinite(value) else None for name, value in found.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data without NaN (None instead)."""
        return {
            "matrix": _finite(self.matrix.scores),
            "sizes": list(self.sizes),
            "untrained": _finite(np.asarray(self.untrained)),
            "history": {
                "steps": list(self.history.steps),
                "learning": list(self.history.learning),
                "accuracy": [list(row) for row in self.history.accuracy],
                "sizes": list(self.history.sizes),
            },
            "seconds": list(self.seconds),
            "kept_bytes": list(self.kept_bytes),
            "steps": self.steps,
            "gradients": dict(self.gradients),
            "measures": self.measures(),
            "sampling": {name: list(ends) for name, ends in sampling_intervals(self.history).items()},
        }


class Run:
    """A learner on its way through a stream.

    `advance` learns one experience; between two of them `state_dict` is all that is needed to go on in
    another process, to the same result bit for bit.

    Args:
        learner: Its hyperparameters; `begin` is called.
        stream: What is learned.
        model: The network; copied.
        task: The domain.
        training: How the network learns; an online stream makes it one epoch.
        runtime: Seed and device.
        every: Steps between evaluations while learning; 0 evaluates only after experiences.
        subset: At most so many records of each test in evaluations while learning.
        gradients: Whether norms of plasticity and stability are noted at every step.

    Raises:
        PalimpsestError: If model, task and stream do not fit, before any work.
    """

    def __init__(
        self,
        learner: Learner,
        stream: Stream,
        model: nn.Module,
        task: Task | None = None,
        training: Training | None = None,
        runtime: Runtime | None = None,
        every: int = 0,
        subset: int | None = 1000,
        gradients: bool = False,
    ):
        self.learner, self.stream = learner, stream
        self.task, self.runtime = task or Classification(), runtime or Runtime()
        training = training or Training()
        self.training = online(training) if stream.online else training
        model = self.runtime.place(copy.deepcopy(model))
        check_finite(model)
        for experience in stream:
            self.task.check(model, experience.records)
            self.task.check(model, experience.test)
        student = Student(model, self.task, self.runtime, self.training, stream.scenario, stream.classes)
        student.forces = Forces() if gradients else None
        learner.begin(student)
        self.tests = TestSet(stream.experiences, self.task, self.runtime, stream.scenario == "task")
        self.evaluation = (
            ContinualEvaluation(stream, learner, self.task, self.runtime, every, subset) if every else None
        )
        self.done = 0
        self.rows: list[list[float]] = []
        self.seconds: list[float] = []
        self.kept: list[int] = []
        self.untrained = self._untrained()

    @property
    def finished(self) -> bool:
        """Whether all experiences were learned."""
        return self.done == len(self.stream)

    def advance(self) -> None:
        """Learn the next experience and evaluate after it."""
        index = self.done
        keeps_all = Keeps.ALL_DATA in self.learner.card.keeps
        experience = self.stream.with_past(index) if keeps_all else self.stream[index]
        if self.evaluation is not None:
            self.evaluation.enter(index)
        start = time.perf_counter()
        self.learner.observe(experience)
        self.seconds.append(time.perf_counter() - start)
        row = self.tests.accuracies(self.learner) if self.stream.scenario != "task" else self._task_row(index)
        met = index + 1 if self.stream.scenario != "domain" else len(self.stream)
        self.rows.append([value if task < met else float("nan") for task, value in enumerate(row)])
        self.kept.append(kept_bytes(self.learner) + (self._past_bytes(index) if keeps_all else 0))
        self.done += 1

    def outcome(self) -> Outcome:
        """What came of it, at the end."""
        history = self.evaluation.history if self.evaluation is not None else History((), ())
        return Outcome(
            ScoreMatrix(np.asarray(self.rows)), self.tests.sizes, tuple(self.untrained), history,
            tuple(self.seconds), tuple(self.kept), self.learner.student.steps, self._gradients(), self.learner,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """For resuming between experiences."""
        return {
            "done": self.done,
            "rows": self.rows,
            "seconds": self.seconds,
            "kept": self.kept,
            "learner": self.learner.state_dict(),
            "evaluation": self.evaluation.state_dict() if self.evaluation else None,
            "gradients": self._gradients(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.done = int(state["done"])
        self.rows = [[float(value) for value in row] for row in state["rows"]]
        self.seconds, self.kept = list(state["seconds"]), list(state["kept"])
        self.learner.load_state_dict(state["learner"])
        if self.evaluation is not None and state["evaluation"] is not None:
            self.evaluation.load_state_dict(state["evaluation"])
        if self.learner.student.forces is not None:
            self.learner.student.forces.load(state["gradients"])

    def _past_bytes(self, index: int) -> int:
        """Memory of all earlier records, for learners that learn them again."""
        past = [experience.records.tensors for experience in self.stream.experiences[:index]]
        return sum(_bytes(tensors) for tensors in past if tensors is not None)

    def _gradients(self) -> dict[str, list[Any]]:
        forces = self.learner.student.forces
        return {} if forces is None else forces.to_dict()

    def _task_row(self, index: int) -> list[float]:
        """Accuracy on the tasks met; a task id that was never met has no classes to choose from."""
        met = TestSet(self.stream.experiences[: index + 1], self.task, self.runtime, True)
        return met.accuracies(self.learner) + [float("nan")] * (len(self.stream) - index - 1)

    @torch.no_grad()
    def _untrained(self) -> list[float]:
        """Accuracy of the fresh network on each task of a domain-incremental stream, else NaN."""
        if self.stream.scenario != "domain":
            return [float("nan")] * len(self.stream)
        student = self.learner.student
        seen = student.seen.clone()
        student.seen[:] = True
        found = self.tests.accuracies(_Untrained(student))  # pyright: ignore[reportArgumentType]
        student.seen = seen
        return found


class _Untrained:
    """A network that answers before it has learned."""

    def __init__(self, student: Student):
        self.student = student

    def predict(self, batch: dict[str, Any]) -> Tensor:
        return self.student.predict(batch)


def learn(
    learner: str | Learner,
    stream: Stream,
    model: nn.Module,
    *,
    task: Task | None = None,
    training: Training | None = None,
    runtime: Runtime | None = None,
    every: int = 0,
    subset: int | None = 1000,
    gradients: bool = False,
    **settings: Any,
) -> Outcome:
    """Run a learner over a whole stream.

    Args:
        learner: By name, with `settings`, or an instance.
        stream: What is learned.
        model: The network, with one output per class of the stream; not changed.
        task: The domain; classification by default.
        training: How the network learns.
        runtime: Seed and device.
        every: Steps between evaluations while learning; 0 evaluates only after experiences.
        subset: At most so many records of each test in evaluations while learning; None takes all.
        gradients: Whether norms of plasticity and stability are noted at every step.
        **settings: Hyperparameters of a learner that is given by name.

    Raises:
        PalimpsestError: If something does not fit, before any work.
    """
    if isinstance(learner, str):
        learner = build_learner(learner, settings, stream.scenario)
    run = Run(learner, stream, model, task, training, runtime, every, subset, gradients)
    while not run.finished:
        run.advance()
    return run.outcome()


def kept_bytes(learner: Learner) -> int:
    """Memory of what a learner keeps beside its network: tensors of its state, without the student's."""
    return _bytes({name: part for name, part in learner.state_dict().items() if name != "student"})


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_bytes(item) for name, item in value.items() if name != "generator")
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _finite(values: NDArray[np.float64]) -> Any:
    plain = values.astype(object)
    plain[~np.isfinite(values)] = None
    return plain.tolist()
