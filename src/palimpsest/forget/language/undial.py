"""UNDIAL: distil from the original with the true token made less likely."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from palimpsest.core.needs import Need
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.objective import Context, Losses, Step, Term
from palimpsest.forget.objectives import undial_loss
from palimpsest.forget.terms import BalancedMethod, Retain


@unlearner(
    "undial",
    needs={Need.MODEL, Need.FORGET_DATA},
    tasks=("language",),
    paper=Paper(
        "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models",
        "NAACL 2025",
        "2402.10052",
    ),
    search={
        "beta": Span(3.0, 30.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(3, 15, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class Undial(BalancedMethod):
    """Learn the original's own distribution with the logit of the true token lowered by beta.

    A target that stays where it is: the loss is bounded and training longer does no more harm. Retained
    records are optional (alpha is 0 as published).

    Attributes:
        beta: How much the true token's logit loses; 3, 10 and 30 are published.
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
        retain: "nll" (token-mean loss), "kl" (from the original) or "none".
    """

    lr: float = 1e-4
    beta: float = 10.0
    retain: Retain = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("beta", self.beta, 0, math.inf, open_low=True)

    @property
    def needs_original(self) -> bool:
        """Always: the original is the teacher."""
        return True

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The terms of a step."""

        def losses(step: Step) -> Losses:
            logits = context.task.logits(context.model, step.forget)
            with torch.no_grad():
                teacher = context.task.logits(context.reference, step.forget)
            forget = undial_loss(logits, teacher, step.forget["labels"], self.beta)
            return self.balanced(context, step, Term(forget, "token"))

        return losses
