"""Evaluation of a learner on the tasks of a stream: after experiences, and while it learns.

A learner is shown inputs and nothing else: no labels, no ids, and records of all tasks mixed in a fixed
random order, so that neither a field nor the company of a record tells its task. Only in a
task-incremental stream the task id is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InvalidStream
from palimpsest.core.records import Batch
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task
from palimpsest.parts.recorder import Recorder
from palimpsest.retain.learner import Learner
from palimpsest.retain.metrics import History
from palimpsest.retain.streams import Experience, Stream
from palimpsest.retain.transforms import joined

SECRET = ("label", "id", "index", "original", "task")


class TestSet:
    """Test records of several experiences, mixed, ready for prediction.

    Args:
        experiences: Whose tests are taken.
        task: Whose `collate` makes the batches.
        runtime: Device, batch size, and the seed of the draw and the order.
        tell_task: Whether batches say the task id.
        subset: At most so many records of each test, drawn once; None takes all.
    """

    __test__ = False

    def __init__(
        self,
        experiences: Sequence[Experience],
        task: Task,
        runtime: Runtime,
        tell_task: bool,
        subset: int | None = None,
    ):
        if subset is not None and subset < 1:
            raise InvalidStream(f"An evaluation needs at least 1 record of each test, not {subset}.")
        parts = []
        for experience in experiences:
            records, limit = experience.test, len(experience.test) if subset is None else subset
            if limit < len(records):
                drawn = runtime.numpy("evaluation subset", experience.index).permutation(len(records))[:limit]
                records = records.select(np.sort(drawn))
            parts.append(records)
        self.sizes = tuple(len(part) for part in parts)
        place = np.repeat(np.arange(len(parts)), self.sizes)
        ids = [f"{number}/{name}" for number, part in enumerate(parts) for name in part.ids]
        order = runtime.numpy("evaluation order", len(parts)).permutation(len(ids))
        whole = joined(parts, ids=ids).select(order)
        self.labels = torch.from_numpy(whole.column("label").astype(np.int64)).to(runtime.torch_device)
        self.places = torch.from_numpy(place[order]).to(runtime.torch_device)
        tasks = torch.tensor([-1 if item.task is None else item.task for item in experiences])
        self._batches: list[Batch] = []
        done = 0
        for batch in runtime.batches(whole, task):
            shown = {name: value for name, value in batch.items() if name not in SECRET}
            count = len(batch["id"])
            if tell_task:
                shown["task"] = tasks.to(self.places.device)[self.places[done : done + count]]
            self._batches.append(shown)
            done += count

    def accuracies(self, learner: Learner) -> list[float]:
        """Share of right answers in each test."""
        right = self.right(learner).double()
        total = torch.zeros(len(self.sizes), dtype=torch.float64, device=right.device).index_add_(
            0, self.places, right
        )
        return (total.cpu() / torch.tensor(self.sizes)).tolist()

    @torch.no_grad()
    def right(self, learner: Learner) -> Tensor:
        """Whether each answer is right, in the mixed order."""
        answers = [learner.predict(dict(batch)).to(self.labels.device) for batch in self._batches]
        return torch.cat(answers) == self.labels


class ContinualEvaluation:
    """Accuracy on every task met, every few optimiser steps, beside a training that it does not disturb.

    The evaluation records are drawn once per run: new ones at each evaluation would add noise that lowers
    min-ACC and raises WF and WP.

    Args:
        stream: What is learned.
        learner: Whose answers are judged.
        task: The domain.
        runtime: Device and seed.
        every: Steps between evaluations.
        subset: At most so many records of each test; None takes all.
    """

    def __init__(
        self,
        stream: Stream,
        learner: Learner,
        task: Task,
        runtime: Runtime,
        every: int = 1,
        subset: int | None = 1000,
    ):
        self.stream, self.learner, self.task, self.runtime, self.subset = (
            stream,
            learner,
            task,
            runtime,
            subset,
        )
        self.recorder: Recorder[list[float]] = Recorder(self._measure, every)
        self._learning: list[int] = []
        self._tests: TestSet | None = None
        self._index = 0

    def enter(self, index: int) -> None:
        """An experience begins: its test is registered as met, and steps are recorded from now on."""
        self._index = index
        tell = self.stream.scenario == "task"
        met = self.stream.experiences[: index + 1]
        self._tests = TestSet(met, self.task, self.runtime, tell, self.subset)
        self.learner.student.recorder = self.recorder

    @property
    def history(self) -> History:
        """What was measured so far."""
        limit = self.subset or 2**62
        sizes = tuple(min(limit, len(item.test)) for item in self.stream.experiences[: self._index + 1])
        values = tuple(tuple(row) for row in self.recorder.values)
        return History(tuple(self._learning), values, tuple(self.recorder.steps), sizes)

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        return {"recorder": self.recorder.state_dict(), "learning": list(self._learning)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.recorder.load_state_dict(state["recorder"])
        self._learning = [int(task) for task in state["learning"]]
        self._index = max(self._learning, default=0)

    def _measure(self) -> list[float]:
        assert self._tests is not None
        self._learning.append(self._index)
        return self._tests.accuracies(self.learner)
