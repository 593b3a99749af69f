"""WGA: gradient ascent that weighs every token by how well it is still known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from palimpsest.core.needs import Need
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.gradient import GradientMethod
from palimpsest.forget.objective import Context, Losses, Step, Term
from palimpsest.forget.objectives import wga_loss
from palimpsest.forget.terms import Retain, check_retain, retain_term


@unlearner(
    "wga",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper(
        "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond",
        "ICLR 2025",
        "2502.19301",
    ),
    search={
        "beta": Span(0.5, 5.0, log=True),
        "alpha": Span(0.5, 5.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(3, 15, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class WGA(GradientMethod):
    """Ascend on forget answers, every token weighed by its own probability to the power of beta, detached.

    Tokens that are forgotten no longer pull, so the ascent does not run away as plain gradient ascent does.

    Attributes:
        beta: Exponent; 0 is plain ascent.
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
        retain: "nll" (token-mean loss), "kl" (from the original) or "none".
    """

    epochs: int = 5
    beta: float = 1.0
    gamma: float = 1.0
    alpha: float = 1.0
    retain: Retain = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("beta", self.beta, 0, math.inf)
        check_retain(self.retain, self.gamma, self.alpha)

    @property
    def needs_original(self) -> bool:
        """Only for the KL retain term: the released code keeps a copy that it never looks at."""
        return self.retain == "kl"

    @property
    def needs_retain(self) -> bool:
        """Unless there is no retain term."""
        return self.retain != "none"

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The two terms of a step."""

        def losses(step: Step) -> Losses:
            logits = context.task.logits(context.model, step.forget)
            forget = Term(wga_loss(logits, step.forget["labels"], self.beta), "token")
            return Losses(forget, retain_term(context, step, self.retain), self.gamma, self.alpha)

        return losses
