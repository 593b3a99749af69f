"""The student: a network with its optimiser, the classes that it has met, and where it learns.

Learners hold one and call it; their own files show the training loop.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidLabels,
    MissingTaskId,
    ModelMismatch,
    NonFiniteLoss,
    NotTrained,
)
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task
from palimpsest.parts.activations import head_name
from palimpsest.parts.recorder import Recorder
from palimpsest.retain.augmentation import AUGMENTATIONS, Augmentation, view
from palimpsest.retain.forces import Forces, Held
from palimpsest.retain.heads import masked, outputs_of, resize_head
from palimpsest.retain.projection import flat_gradient
from palimpsest.retain.streams import Experience, Scenario


@dataclass(frozen=True)
class Training:
    """How a network learns from one experience; the same for all methods that are compared.

    Attributes:
        epochs: Passes over an experience; an online stream allows one, whatever this says.
        lr: Learning rate.
        batch_size: New records per step; replayed ones come on top.
        optimizer: "sgd", "adam" or "adadelta".
        momentum: Of SGD.
        weight_decay: Of the optimizer.
        clip: Largest gradient norm; None does not clip.
        keep_optimizer: Whether its state (momentum, moments) lives on over the experiences.
        head: "full" has an output for every class of the stream from the beginning, "growing" gets the
            outputs of new classes when they come.
        augmentation: Of the views that are trained on.
    """

    epochs: int = 1
    lr: float = 0.1
    batch_size: int = 16
    optimizer: Literal["sgd", "adam", "adadelta"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    keep_optimizer: bool = False
    head: Literal["full", "growing"] = "full"
    augmentation: Augmentation = "none"

    def __post_init__(self) -> None:
        positive = 0 < self.lr < float("inf") and 0 <= self.momentum < 1 and self.weight_decay >= 0
        if (
            self.epochs < 1
            or self.batch_size < 1
            or not positive
            or (self.clip is not None and self.clip <= 0)
        ):
            raise InvalidHyperparameter(
                "epochs and batch_size must be at least 1, lr above 0 and finite, momentum in [0, 1), "
                f"weight_decay at least 0, clip above 0: {self}."
            )
        known = {
            "optimizer": ("sgd", "adam", "adadelta"),
            "head": ("full", "growing"),
            "augmentation": AUGMENTATIONS,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise InvalidHyperparameter(
                    f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}."
                )
        if self.head == "growing" and self.keep_optimizer:
            raise InvalidHyperparameter(
                "A growing head needs a new optimiser: keep_optimizer cannot be kept."
            )

    def build_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of some parameters."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.Adadelta
        return kind(parameters, self.lr, weight_decay=self.weight_decay)


class Student:
    """A network that learns a stream, with what all learners need of it.

    Args:
        model: The network, with one output per class of the stream. Owned and trained in place.
        task: The domain; records have the fields "input" and "label".
        runtime: Seed and device.
        training: How it learns.
        scenario: Of the stream.
        classes: Of the stream.

    Attributes:
        optimizer: Of the current experience.
        seen: Which classes have been met.
        tasks: Classes of each task id, in a task-incremental stream.
        steps: Optimiser steps so far.
        experiences: Experiences learned, or being learned.
        attached: Further modules that are trained and saved with the network (prototypes, projections).
        recorder: Called after every step and every epoch.
        forces: Notes the two parts of every gradient, if they are asked for.

    Raises:
        ModelMismatch: If the model has another number of outputs than there are classes.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        runtime: Runtime,
        training: Training,
        scenario: Scenario,
        classes: int,
    ):
        self.task, self.runtime, self.training, self.scenario = task, runtime, training, scenario
        self.model, self.classes = runtime.place(model), classes
        self.seen = torch.zeros(classes, dtype=torch.bool, device=runtime.torch_device)
        self.tasks: dict[int, tuple[int, ...]] = {}
        self.attached: dict[str, nn.Module] = {}
        self.steps, self.experiences = 0, 0
        self.recorder: Recorder[Any] | None = None
        self.forces: Forces | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self._head: str | None = getattr(task, "head", None) or head_name(model)
        outputs = outputs_of(model, self._head)
        if outputs != classes:
            raise ModelMismatch(
                f"The model has {outputs} outputs, the stream {classes} classes: build it with as many."
            )
        self._order = self._random = self._views = torch.Generator()

    @property
    def outputs(self) -> int:
        """Outputs of the head as it is now."""
        return outputs_of(self.model, self._head)

    def generator(self, name: str) -> torch.Generator:
        """A generator for a method's own draws."""
        return self.runtime.generator("learner", name)

    def attach(self, name: str, module: nn.Module) -> nn.Module:
        """Train and save a module with the network."""
        self.attached[name] = self.runtime.place(module)
        return self.attached[name]

    def parameters(self) -> list[nn.Parameter]:
        """Everything that trains."""
        modules = [self.model, *self.attached.values()]
        return [
            parameter for module in modules for parameter in module.parameters() if parameter.requires_grad
        ]

    @contextmanager
    def learning(self, experience: Experience) -> Generator[Student]:
        """Training mode for one experience: its classes are met, the head grows, the optimiser is made.

        Every random number of the experience comes from its own streams, so that a run that is resumed
        between experiences is the same run. Evaluation mode after.

        Raises:
            MissingTaskId: If a task-incremental experience has no task id.
        """
        index = experience.index
        with self.runtime.seeded("experience", index):
            self._meet(experience)
            if self.optimizer is None or not self.training.keep_optimizer:
                self.optimizer = self.training.build_optimizer(self.parameters())
            self._order = self.runtime.generator("order", index)
            self._views = self.runtime.generator("views", index)
            for module in (self.model, *self.attached.values()):
                module.train()
            yield self
            for module in (self.model, *self.attached.values()):
                module.eval()

    def epochs(self) -> Iterator[int]:
        """Numbers of the passes over an experience."""
        for epoch in range(self.training.epochs):
            yield epoch
            if self.recorder is not None:
                self.recorder.now(self.model, self.steps)

    def batches(self, records: Records, batch_size: int | None = None) -> Iterator[Batch]:
        """One pass in random order, on the device.

        A last batch of a single record is left out (batch norm has no statistics of one), unless it is
        the only one.
        """
        size = batch_size or self.training.batch_size
        for batch in self.runtime.batches(records, self.task, size, shuffle=self._order):
            if len(batch["label"]) > 1 or min(size, len(records)) == 1:
                yield batch

    def augmented(self, batch: Batch) -> Batch:
        """The batch in another view, as `training.augmentation` says."""
        return {**batch, "input": view(batch["input"], self.training.augmentation, self._views)}

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Outputs of the network as it is, with their graph; nothing is masked."""
        return self.task.logits(self.model, batch)

    def features(self, batch: Batch) -> Float[Tensor, "batch dim"]:
        """Representation before the head, with its graph."""
        return self.task.features(self.model, batch)

    def step(self, loss: Float[Tensor, ""], held: Held | None = None) -> None:
        """One descent step on a loss.

        Args:
            loss: The whole of it.
            held: Its part that holds on to what was learned, for `forces`.
        """
        stability = None if self.forces is None else self.forces.gradient_of(held, self.parameters())
        self.backward(loss)
        if stability is not None:
            self.note(flat_gradient(self.parameters()) - stability, stability)
        self.apply()

    def note(self, plasticity: Float[Tensor, " parameters"], stability: Float[Tensor, " parameters"]) -> None:
        """Note the gradient of the new records and what holds on to old ones, if `forces` asks for it."""
        if self.forces is not None:
            self.forces.note(self.steps, self.experiences - 1, plasticity, stability)

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Gradients of a loss, and of nothing else, in the `grad` fields.

        Raises:
            NonFiniteLoss: If it is NaN or Inf.
        """
        if not torch.isfinite(loss):
            raise NonFiniteLoss(f"The loss became {loss.item()} after {self.steps} steps: try a smaller lr.")
        for parameter in self.parameters():
            parameter.grad = None
        loss.backward()

    def apply(self) -> None:
        """One step along the gradients in the `grad` fields."""
        if self.optimizer is None:
            raise NotTrained("Enter student.learning(experience) before a step.")
        if self.training.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.training.clip)
        self.optimizer.step()
        self.steps += 1
        if self.recorder is not None:
            self.recorder.after_step(self.model, self.steps)

    def allowed(self, batch: Batch) -> Bool[Tensor, "*batch classes"]:
        """Classes that an answer may name: those met, and with a task id those of the task.

        Raises:
            NotTrained: If nothing has been met.
            MissingTaskId: If the setting tells the task id and the batch has no field "task", or names a
                task that was never met.
        """
        if not self.seen.any():
            raise NotTrained("Nothing was learned yet: call observe(experience) first.")
        if self.scenario != "task":
            return self.seen[: self.outputs]
        if "task" not in batch:
            raise MissingTaskId(
                "Task-incremental prediction needs the task ids of the batch in its field 'task'."
            )
        table = torch.zeros((max(self.tasks) + 1, self.classes), dtype=torch.bool, device=self.seen.device)
        for task, classes in self.tasks.items():
            table[task, list(classes)] = True
        ids = batch["task"].to(table.device)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= len(table)):
            raise MissingTaskId(f"Tasks 0 to {len(table) - 1} were learned, not {int(ids.max())}.")
        return table[ids][:, : self.outputs]

    @torch.no_grad()
    def scores(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Logits in evaluation mode, minus infinity for classes that are not `allowed`."""
        allowed = self.allowed(batch)
        with evaluating(self.model):
            return masked(self.logits(batch), allowed)

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The allowed class of largest logit."""
        return self.scores(batch).argmax(1)

    def state_dict(self) -> dict[str, Any]:
        """For resuming between experiences."""
        return {
            "model": dict(self.model.state_dict()),
            "attached": {name: dict(module.state_dict()) for name, module in self.attached.items()},
            "optimizer": self.optimizer.state_dict()
            if self.optimizer and self.training.keep_optimizer
            else None,
            "seen": self.seen.cpu(),
            "tasks": [[task, list(classes)] for task, classes in self.tasks.items()],
            "steps": self.steps,
            "experiences": self.experiences,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume; a growing head gets its size first."""
        weights = state["model"]
        name = f"{self._head}.weight"
        if name in weights:
            with self.runtime.seeded("resume"):
                resize_head(self.model, len(weights[name]), self._head)
        self.model.load_state_dict(weights)
        for module, values in state["attached"].items():
            self.attached[module].load_state_dict(values)
        if state["optimizer"] is not None:
            self.optimizer = self.training.build_optimizer(self.parameters())
            self.optimizer.load_state_dict(state["optimizer"])
        self.seen = state["seen"].to(self.seen.device)
        self.tasks = {int(task): tuple(int(label) for label in classes) for task, classes in state["tasks"]}
        self.steps, self.experiences = int(state["steps"]), int(state["experiences"])
        self.model.eval()

    def _meet(self, experience: Experience) -> None:
        """Note the classes of an experience and give the head its outputs."""
        if max(experience.classes) >= self.classes:
            raise InvalidLabels(
                f"Experience {experience.index} has class {max(experience.classes)}, the stream {self.classes} classes."
            )
        self.seen[list(experience.classes)] = True
        self.experiences = experience.index + 1
        if self.scenario == "task":
            if experience.task is None:
                raise MissingTaskId(f"Experience {experience.index} has no task id.")
            self.tasks[experience.task] = experience.classes
        if self.training.head == "growing":
            resize_head(self.model, int(self.seen.nonzero().max()) + 1, self._head)


def together(batch: Batch, replay: Mapping[str, Tensor]) -> Batch:
    """Inputs and labels of the current batch, then those of a replayed one (which may be empty).

    A field "view" (which view of its record each row is, see `view_schedule`) goes along.
    """
    names = ("input", "label", "view") if "view" in batch else ("input", "label")
    return {
        name: torch.cat([batch[name], replay[name].to(batch[name])]) if replay else batch[name]
        for name in names
    }


def online(training: Training) -> Training:
    """The same training in one pass."""
    return replace(training, epochs=1)
