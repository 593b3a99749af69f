"""LAF+R: label-agnostic forgetting, then a short supervised repair of the head."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from palimpsest.core.errors import MissingNeed, ModelMismatch
from palimpsest.core.needs import Need
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import check_range, unlearner
from palimpsest.forget.classifier.laf import LAF, LARGEST, PAPER
from palimpsest.parts.activations import head_name
from palimpsest.parts.pairing import cycled
from palimpsest.parts.parameters import matching, only_trainable, unwrapped
from palimpsest.parts.training import step
from palimpsest.tasks.classification import Classification


@unlearner(
    "laf-r",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    tasks=("classification",),
    paper=PAPER,
    search={
        "steps": Span(120, 960, integer=True),
        "temperature": Span(1, 20, log=True),
        "repair_lr": Span(1e-4, 1e-2, log=True),
    },
)
@dataclass(frozen=True)
class LAFRepair(LAF):
    """LAF, then a few steps of cross-entropy for the head on labelled retained records (LAF+R).

    Everything before the repair is LAF as it is, under the same seed to the last bit, and reads no label; no
    label of a forget record is ever read. The repair moves the head alone (the last linear layer, or
    `Classification.head`), whatever `layer` the representations come from; batch norm and dropout stay in
    evaluation mode. Use it where some retained labels are at hand and LAF alone costs accuracy, or leaves a
    class recognised because the head maps the moved representations back to it. The repair by itself, on the
    digits, still leaves 70 to 80 % of a class.

    Deviation: the published script repairs for epochs that stop with the forget loader; here the steps are
    counted.

    Attributes:
        repair_steps: Steps of the head, as many batches of retained records.
        repair_lr: Learning rate of Adam.
        repair_fraction: Share of the retained records whose labels are used, in (0, 1], drawn once.
    """

    repair_steps: int = 60
    repair_lr: float = 1e-3
    repair_fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("repair_steps", self.repair_steps, 1, float("inf"))
        check_range("repair_lr", self.repair_lr, 0, LARGEST, open_low=True)
        check_range("repair_fraction", self.repair_fraction, 0, 1, open_low=True)

    def unlearn(
        self, model: nn.Module, split: ForgetSplit, task: Classification, runtime: Runtime
    ) -> nn.Module:
        """The student after the last step of the repair.

        Raises:
            MissingNeed: If the retained records or their labels are not at hand.
            ModelMismatch: If no parameter of the head is trainable.
        """
        retain = split.retain
        if retain is None or task.label not in retain.batch([0], task.collate):
            raise MissingNeed("LAF+R repairs the head with labelled retained records; 'laf' needs no labels.")
        _ = head_parameters(model, task)
        student = super().unlearn(model, split, task, runtime)
        count = max(1, int(self.repair_fraction * len(retain)))
        drawn = torch.randperm(len(retain), generator=runtime.generator("laf-r sample"))[:count]
        labelled = retain.select(drawn.sort().values.numpy())
        return repair_head(
            student, labelled, task, runtime, self.repair_steps, self.repair_lr, self.batch_size
        )


def repair_head(
    student: nn.Module,
    labelled: Records,
    task: Classification,
    runtime: Runtime,
    steps: int = 60,
    lr: float = 1e-3,
    batch_size: int = 32,
) -> nn.Module:
    """Steps of Adam on the mean loss of labelled records, for the head alone, in place; for owners of the model."""
    order = runtime.generator("laf-r order")
    batches = islice(cycled(labelled, task, runtime, batch_size, order), steps)
    student.eval()
    with only_trainable(student, head_parameters(student, task)) as head, runtime.seeded("laf-r"):
        optimizer = torch.optim.Adam(head.values(), lr)
        for batch in runtime.track(batches, "laf repair", total=steps):
            step(student, optimizer, task.loss_per_example(student, batch).mean(), batch)
    return student


def head_parameters(model: nn.Module, task: Classification) -> list[str]:
    """Names of the trainable parameters of the head.

    Raises:
        ModelMismatch: If there are none.
    """
    inner = unwrapped(model)
    head = task.head or head_name(inner)
    names = [name for name, parameter in matching(inner, head).items() if parameter.requires_grad]
    if not names:
        raise ModelMismatch(f"The head '{head}' has no trainable parameter: there is nothing to repair.")
    return names
