"""Task vector: subtract from the weights what fine-tuning on the forget records adds to them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Card, Paper, check_range, unlearner
from palimpsest.forget.gradient import Training
from palimpsest.forget.language.arithmetic import negate_task_vector
from palimpsest.forget.language.reinforcing import reinforced
from palimpsest.tasks.language import Language


@unlearner(
    "task-vector",
    needs={Need.MODEL, Need.FORGET_DATA},
    tasks=("language",),
    paper=Paper("Editing Models with Task Arithmetic", "ICLR 2023", "2212.04089"),
    search={
        "scale": Span(0.5, 5.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(1, 10, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class TaskVector(Training):
    """Train a copy further on the forget records, and walk as far in the opposite direction.

    theta - scale * (theta_reinforced - theta). No retained records are used. A model that knows its forget
    records by heart has hardly a gradient left on them, so its vector is short: it takes more epochs or a
    larger scale.

    Attributes:
        scale: How far; 0 gives the model as it is, 1 is Ilharco's, 5 MUSE's.
    """

    card: ClassVar[Card]
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("scale", self.scale, 0, math.inf)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> nn.Module:
        """The model minus the vector.

        Raises:
            ModelMismatch: If the vector is zero, or the scope left other weights than the model's behind.
        """
        further = reinforced(self, model, split, task, runtime)
        student = runtime.place(copy.deepcopy(model))
        state: dict[str, Any] = dict(student.state_dict())
        moved = negate_task_vector(state, further.state_dict(), scale=self.scale)
        with torch.no_grad():
            student.load_state_dict(moved)
        return student.eval()
