"""A model that was trained further on the forget records: what task vectors and WHP subtract."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.forget.gradient import GradientUnlearner, Training
from palimpsest.forget.objective import Context, Losses, Step, token_term
from palimpsest.tasks.language import Language


@dataclass(frozen=True)
class Reinforce:
    """Descend on the token-mean loss of the forget records: the opposite of unlearning."""

    needs_original: bool = False
    needs_retain: bool = False

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The term of a step."""

        def losses(step: Step) -> Losses:
            return Losses(token_term(context, step.forget))

        return losses


def reinforced(
    training: Training, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime
) -> nn.Module:
    """A copy of a model, trained on the forget records under the training settings of a method."""
    settings = {item.name: getattr(training, item.name) for item in dataclasses.fields(Training)}
    return GradientUnlearner(objective=Reinforce(), **settings).unlearn(model, split, task, runtime)
