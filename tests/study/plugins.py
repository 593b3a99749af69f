"""Methods and jobs of a third party, in a module that worker processes can import."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import unlearner
from palimpsest.parts.training import step
from palimpsest.study.plan import Job
from palimpsest.study.workshop import Done


@unlearner("study-test-diverging", needs={Need.MODEL, Need.FORGET_DATA})
@dataclass(frozen=True)
class Diverging:
    """Ascend until the loss is NaN."""

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        student = copy.deepcopy(model)
        optimizer = torch.optim.SGD(student.parameters(), 1e20)
        for _ in range(20):
            for batch in runtime.batches(split.forget, task, 64):
                step(student, optimizer, -task.loss_per_example(student, batch).mean(), batch)
        return student


@unlearner("study-test-buggy", needs={Need.MODEL})
@dataclass(frozen=True)
class Buggy:
    """Fail in a way that nobody foresaw."""

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        return {}["absent"]


@unlearner("study-test-dying", needs={Need.MODEL})
@dataclass(frozen=True)
class Dying:
    """Be killed, as for want of memory, unless a file says that it happened often enough."""

    tally: str
    times: int = 1

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        tally = Path(self.tally)
        died = len(tally.read_text()) if tally.exists() else 0
        if died < self.times:
            tally.write_text("x" * (died + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return copy.deepcopy(model)


@unlearner("study-test-picky", needs={Need.MODEL, Need.REFERENCE_MODEL})
@dataclass(frozen=True)
class Picky:
    """Need what a study cannot give."""

    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise InvalidHyperparameter(f"strength must be at least 0, not {self.strength}.")

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        return copy.deepcopy(model)


def obeying() -> Callable[[Job], Done]:
    """Does what a job's title says, and notes its process.

    "die"; "die once FILE"; "meet FOLDER" (wait for a second job that meets there), "sleep SECONDS".
    """

    def do(job: Job) -> Done:
        word, _, rest = job.title.partition(" ")
        if job.title == "die" or (job.title.startswith("die once") and not Path(rest[5:]).exists()):
            if rest:
                Path(rest[5:]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "meet":
            (Path(rest) / str(os.getpid())).touch()
            while len(list(Path(rest).iterdir())) < 2:
                time.sleep(0.01)
        if word == "sleep":
            time.sleep(float(rest))
        return Done(job.key, "done", reason=str(os.getpid()))

    return do


def stillborn() -> Callable[[Job], Done]:
    """Cannot even begin."""
    os._exit(3)
