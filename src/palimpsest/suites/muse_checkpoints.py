"""MUSE's choice of the checkpoint: the first epoch whose KnowMem on the forget data is that of retraining.

Shi et al. 2025, arXiv 2407.06460: a model is saved after every epoch, and all scores are of the first that
answers questions about the forget data no better than the retrained model; of the last, if none does.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, unlearner
from palimpsest.forget import build_unlearner, forget
from palimpsest.forget.gradient import GradientMethod
from palimpsest.parts.training import recipe_of
from palimpsest.suites.muse_audit import Muse, knowmem_of
from palimpsest.suites.muse_scores import chosen_checkpoint
from palimpsest.tasks.language import Language

CHECKPOINT_ATTRIBUTE = "palimpsest_checkpoint"
"""Of a chosen model: {"epoch", "knowmem" (of every epoch that was run), "retrained"}."""


@unlearner(
    "muse-checkpoint",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper("MUSE: Machine Unlearning Six-Way Evaluation for Language Models", "ICLR 2025", "2407.06460"),
)
@dataclass(frozen=True)
class MuseCheckpoint:
    """Stop a gradient method after the first epoch that knows no more of the forget data than retraining does.

    The choice looks at a retrained model: it belongs to the benchmark, where there is one anyway, and not to
    production. PrivLeak has no part in it. A method is stopped as soon as the choice is made; what later
    epochs would have given is not needed.

    Attributes:
        method: Name of a gradient method.
        settings: Its hyperparameters.
        retrained: KnowMem of the retrained model on the forget data, x 100; None retrains to find out, which
            takes as long as that takes.
        knowmem: Settings of the audit "muse" that KnowMem is measured with.
    """

    method: str = "grad-diff"
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    retrained: float | None = None
    knowmem: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        inner = build_unlearner(self.method, dict(self.settings))
        if not isinstance(inner, GradientMethod):
            raise InvalidHyperparameter(
                f"'{self.method}' has no epochs to choose from: name a gradient method."
            )
        if self.retrained is not None and not 0 <= self.retrained <= 100:
            raise InvalidHyperparameter(f"KnowMem lies between 0 and 100, not {self.retrained}.")
        Muse(**self.knowmem)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> nn.Module:
        """The chosen checkpoint.

        Raises:
            MissingNeed: If the retrained score is not given, and it is not known how the model was trained.
        """
        threshold = self.retrained
        if threshold is None:
            threshold = retrained_knowmem(model, split, task, runtime, Muse(**self.knowmem))
        inner = build_unlearner(self.method, dict(self.settings))
        assert isinstance(inner, GradientMethod)
        chosen, seen = first_below(inner, model, split, task, runtime, threshold, Muse(**self.knowmem))
        note = {"epoch": len(seen) - 1, "knowmem": seen, "retrained": threshold}
        setattr(chosen, CHECKPOINT_ATTRIBUTE, note)
        return chosen


def first_below(
    method: GradientMethod,
    model: nn.Module,
    split: ForgetSplit,
    task: Language,
    runtime: Runtime,
    retrained: float,
    settings: Muse,
) -> tuple[nn.Module, list[float]]:
    """The model after the first epoch whose KnowMem is at most `retrained`, and KnowMem of every epoch until then.

    The learning rate follows the schedule of the whole run, of which a constant one is MUSE's.
    """
    seen: list[float] = []

    def below(current: nn.Module, epoch: int) -> bool:
        seen.append(knowmem_of(current, split, task, settings))
        return seen[chosen_checkpoint(seen, retrained)] <= retrained

    return method.composed(below).unlearn(model, split, task, runtime), seen


def retrained_knowmem(
    model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime, settings: Muse
) -> float:
    """KnowMem on the forget data of a model retrained without them."""
    if recipe_of(model) is None:
        raise MissingNeed(
            "How the model was trained is not known, so it cannot be retrained: give KnowMem of a retrained model as "
            "retrained=..."
        )
    again = forget(copy.deepcopy(model), split, "retrain", task, runtime=runtime)
    return knowmem_of(runtime.place(again), split, task, settings)
