"""Which modules of a network change when the task does.

"Does Continual Learning Equally Forget All Parameters?" (Zhao, Zhou, Long, Jiang, Zhang, ICML 2023, arXiv
2304.04158). The change of a module is the L1 distance of its parameters divided by their number; the first
epoch of a new task is where sensitivity to the shift shows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter, UnknownName
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task
from palimpsest.parts.activations import head_name, weight_layers
from palimpsest.retain.heads import resize_head
from palimpsest.retain.streams import Experience, Stream
from palimpsest.retain.student import Student, Training, online
from palimpsest.tasks.classification import Classification

if TYPE_CHECKING:
    from rich.table import Table

WORDS = ("head", "norm", "first", "all")
"""Names for groups of modules that any network has."""
Changes = dict[str, float]


def groups(model: nn.Module, statistics: bool = False) -> dict[str, list[str]]:
    """Names of the parameters of every module that owns some.

    A layer's weight and bias are one group; weight and bias of a normalisation are two.

    Args:
        model: Any network.
        statistics: Whether running means and variances are groups too.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = [prefix + part for part, _ in module.named_parameters(recurse=False)]
        if own and is_norm(module):
            found |= {part: [part] for part in own}
        elif own:
            found[name or "model"] = own
        if statistics and is_norm(module):
            parts = [part for part, value in module.named_buffers(recurse=False) if value.is_floating_point()]
            found |= {prefix + part: [prefix + part] for part in parts}
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module scales and shifts what it normalises (its weight is a vector)."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def chosen(model: nn.Module, modules: Sequence[str], head: str | None = None) -> list[str]:
    """Names of the parameters of some modules.

    Args:
        model: The network.
        modules: Names of groups or modules, or words: "head", "norm" (all normalisations), "first" (the
            first layer with a weight matrix), "all".
        head: Name of the head; the last linear layer by default.

    Raises:
        UnknownName: For a module that does not exist; suggests the nearest.
        InvalidHyperparameter: If nothing is chosen.
    """
    of_group, layers = groups(model), weight_layers(model)
    norms = {name for name, module in model.named_modules() if is_norm(module)}
    found: list[str] = []
    for word in modules:
        if word == "all":
            found += [part for parts in of_group.values() for part in parts]
        elif word == "norm":
            found += [
                part for name in of_group for part in of_group[name] if name.rpartition(".")[0] in norms
            ]
        elif word in ("head", "first"):
            found += of_group[(head or head_name(model)) if word == "head" else next(iter(layers))]
        elif word in of_group:
            found += of_group[word]
        elif word in norms:
            found += [part for part in of_group if part.rpartition(".")[0] == word]
        else:
            raise UnknownName("module", word, [*WORDS, *of_group])
    if not found:
        raise InvalidHyperparameter(
            f"{', '.join(modules) or 'nothing'}: this chooses no module of the network."
        )
    return list(dict.fromkeys(found))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and floating-point buffers."""
    return {
        name: value.detach().clone()
        for name, value in [*model.named_parameters(), *model.named_buffers()]
        if value.is_floating_point()
    }


def change(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], of_group: Mapping[str, Sequence[str]]
) -> Changes:
    """L1 distance of every group divided by its size; of a head that has grown, of the rows that were there.

    Example:
        >>> change({"w": torch.zeros(4)}, {"w": torch.tensor([1.0, -1.0, 0.0, 2.0])}, {"w": ["w"]})
        {'w': 1.0}
    """
    found: Changes = {}
    for group, names in of_group.items():
        gaps = [(after[name][: len(before[name])] - before[name]).abs().flatten() for name in names]
        found[group] = torch.cat(gaps).double().mean().item()
    return found


def sensitive(scores: Mapping[str, float], threshold: float) -> list[str]:
    """Groups whose score is above `threshold` times the largest.

    Raises:
        InvalidHyperparameter: If the threshold lies outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise InvalidHyperparameter(f"The threshold must lie in (0, 1], not {threshold}.")
    top = max(scores.values())
    return [name for name, score in scores.items() if score > threshold * top or score == top]


@dataclass(frozen=True)
class Sensitivity:
    """How much every module changed while a stream was learned by plain descent.

    Attributes:
        by_epoch: By task and epoch, the change during that epoch.
        by_task: By task from the second on and epoch, the distance to the same epoch of the task before.
        sizes: Parameters of each group.
        statistics: Groups that are running statistics: they change but cannot be trained.
    """

    by_epoch: tuple[tuple[Changes, ...], ...]
    by_task: tuple[tuple[Changes, ...], ...]
    sizes: Mapping[str, int]
    statistics: frozenset[str] = frozenset()

    @property
    def scores(self) -> Changes:
        """S: mean over tasks from the second on of the change in their first epoch.

        Raises:
            InvalidAudit: If fewer than two tasks were learned.
        """
        if len(self.by_epoch) < 2:
            raise InvalidAudit("Sensitivity to a change of task needs two tasks or more.")
        return {name: float(np.mean([task[0][name] for task in self.by_epoch[1:]])) for name in self.sizes}

    def selected(self, threshold: float) -> list[str]:
        """Trainable groups of score above `threshold` times the largest."""
        trainable = {name: score for name, score in self.scores.items() if name not in self.statistics}
        return sensitive(trainable, threshold)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "scores": self.scores,
            "sizes": dict(self.sizes),
            "statistics": sorted(self.statistics),
            "by_epoch": [list(task) for task in self.by_epoch],
            "by_task": [list(task) for task in self.by_task],
        }

    def table(self) -> Table:
        """For the terminal: modules by falling score."""
        from rich.table import Table

        table = Table(title="Change per parameter in the first epoch of a new task")
        for heading in ("module", "parameters", "change"):
            table.add_column(heading, justify="left" if heading == "module" else "right")
        for name, score in sorted(self.scores.items(), key=lambda item: -item[1]):
            table.add_row(name, f"{self.sizes[name]:,}", f"{score:.5f}")
        return table


def measure_sensitivity(
    stream: Stream,
    model: nn.Module,
    task: Task | None = None,
    training: Training | None = None,
    runtime: Runtime | None = None,
    tasks: int | None = None,
) -> Sensitivity:
    """Learn a stream, or its first tasks, by plain descent and note how every module changes.

    Args:
        stream: What is learned.
        model: The network, with one output per class of the stream; not changed.
        task: The domain; classification by default.
        training: How the network learns.
        runtime: Seed and device.
        tasks: Only the first so many.

    Raises:
        InvalidAudit: If there are fewer than two tasks.
    """
    learned = stream.experiences[:tasks]
    if len(learned) < 2:
        raise InvalidAudit("Sensitivity to a change of task needs two tasks or more.")
    task, runtime, training = task or Classification(), runtime or Runtime(), training or Training()
    training = online(training) if stream.online else training
    student = Student(copy.deepcopy(model), task, runtime, training, stream.scenario, stream.classes)
    of_group = groups(student.model, statistics=True)
    by_epoch, by_task = list[tuple[Changes, ...]](), list[tuple[Changes, ...]]()
    last: list[dict[str, Tensor]] = []
    for experience in learned:
        states, changes = list[dict[str, Tensor]](), list[Changes]()
        with student.learning(experience):
            before = snapshot(student.model)
            for _ in student.epochs():
                for batch in student.batches(experience.records):
                    student.step(F.cross_entropy(student.logits(student.augmented(batch)), batch["label"]))
                states.append(snapshot(student.model))
                changes.append(change(before, states[-1], of_group))
                before = states[-1]
        by_epoch.append(tuple(changes))
        if last:
            by_task.append(tuple(change(a, b, of_group) for a, b in zip(last, states, strict=True)))
        last = states
    sizes = {group: sum(last[-1][name].numel() for name in names) for group, names in of_group.items()}
    buffers = frozenset(of_group) - frozenset(groups(student.model))
    return Sensitivity(tuple(by_epoch), tuple(by_task), sizes, buffers)


def first_epoch_change(student: Student, experience: Experience) -> Changes:
    """Change of every module in one epoch of plain descent on a new experience, on a copy of the network."""
    model, runtime, training = copy.deepcopy(student.model), student.runtime, student.training
    with runtime.seeded("sensitivity", experience.index):
        if training.head == "growing":
            resize_head(model, max(student.outputs, max(experience.classes) + 1))
        model.train()
        before = snapshot(model)
        optimizer = torch.optim.SGD(model.parameters(), training.lr)
        order = runtime.generator("sensitivity order", experience.index)
        for batch in runtime.batches(experience.records, student.task, training.batch_size, shuffle=order):
            if len(batch["label"]) == 1:
                continue
            loss = F.cross_entropy(student.task.logits(model, batch), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return change(before, snapshot(model), groups(model))
