"""What an accuracy matrix does not show: answers among fewer classes, and how far each layer has moved.

The figures of "A Closer Look at Rehearsal-Free Continual Learning" (arXiv 2203.17269) for any learner that
answers by its network's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.errors import InvalidAudit, InvalidStream
from palimpsest.core.matrix import ScoreMatrix
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task
from palimpsest.parts.activations import capture, head_name, watched_layers
from palimpsest.parts.cka import linear_cka
from palimpsest.retain.heads import masked
from palimpsest.retain.metrics import forgetting_by_steps, global_forgetting, local_forgetting
from palimpsest.retain.running import Run
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.teacher import snapshot


@dataclass(frozen=True)
class Followed:
    """What was seen along a stream.

    Attributes:
        among_earlier: R: accuracy on task n (column) after task i (row), answers among the classes of the tasks up
            to n; NaN for tasks to come.
        among_own: A: the same with answers among the task's own classes.
        sizes: Classes of each task.
        similarity: Linear CKA of every layer between the networks after the first and the last experience, on
            the first task's test records.
        plain: The ordinary accuracy matrix.
    """

    among_earlier: ScoreMatrix
    among_own: ScoreMatrix
    sizes: tuple[int, ...]
    similarity: dict[str, float]
    plain: ScoreMatrix

    def figures(self) -> dict[str, float]:
        """By name."""
        layers = list(self.similarity.values())
        return {
            "global forgetting": global_forgetting(self.among_earlier, self.sizes),
            "local forgetting": local_forgetting(self.among_own),
            "forgetting by steps": forgetting_by_steps(self.plain),
            "CKA of the first layer": layers[0],
            "CKA of the last layer": layers[-1],
        }


def follow(run: Run) -> Followed:
    """Take a run that has not begun to its end, and look at its network after every experience.

    Raises:
        InvalidStream: If the run has begun, or tasks share their classes.
    """
    if run.done or run.stream.scenario == "domain" or run.stream.returning:
        raise InvalidStream(
            "Only a run from its beginning, over tasks without common classes, can be followed."
        )
    student, first = run.learner.student, None
    tasks = list(run.stream)
    earlier = np.full((len(tasks), len(tasks)), np.nan)
    own = earlier.copy()
    with run.runtime.limited():
        while not run.finished:
            run.advance()
            first = first or snapshot(student.model)
            for task in range(run.done):
                earlier[run.done - 1, task], own[run.done - 1, task] = among(student, tasks[: task + 1])
        assert first is not None
        similarity = layer_similarity(first, student.model, tasks[0].test, run.task, run.runtime)
    sizes = tuple(len(task.classes) for task in tasks)
    return Followed(
        ScoreMatrix(earlier), ScoreMatrix(own), sizes, similarity, ScoreMatrix(np.asarray(run.rows))
    )


@torch.no_grad()
def among(student: Student, tasks: Sequence[Experience]) -> tuple[float, float]:
    """Accuracy on the last task's test records, with answers among all classes of the tasks, and its own alone."""
    groups = [[label for task in tasks for label in task.classes], list(tasks[-1].classes)]
    right, total = [0, 0], 0
    with evaluating(student.model):
        for batch in student.runtime.batches(tasks[-1].test, student.task):
            logits, labels = student.logits(batch), batch["label"]
            for place, classes in enumerate(groups):
                allowed = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
                allowed[classes] = True
                right[place] += int((masked(logits, allowed).argmax(1) == labels).sum())
            total += len(labels)
    return right[0] / total, right[1] / total


def layer_similarity(
    one: nn.Module, other: nn.Module, records: Records, task: Task, runtime: Runtime
) -> dict[str, float]:
    """Linear CKA of every layer but the head between two networks of one architecture, in order of definition.

    Raises:
        InvalidAudit: If there are fewer than 3 records, or a layer is the same for all.
    """
    head = getattr(task, "head", None) or head_name(one)
    names = [name for name in watched_layers(one) if name != head]
    if not names:
        raise InvalidAudit("The network has no layer before its head.")
    seen = [_activations(model, names, records, task, runtime) for model in (one, other)]
    return {name: linear_cka(seen[0][name], seen[1][name]) for name in names}


@torch.no_grad()
def _activations(
    model: nn.Module, names: Sequence[str], records: Records, task: Task, runtime: Runtime
) -> dict[str, Tensor]:
    """Pooled outputs of layers on all records."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with evaluating(model):
        for batch in runtime.batches(records, task):
            with capture(model, names) as seen:
                task.logits(model, batch)
            for name in names:
                found[name].append(seen.layers[name].cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}
