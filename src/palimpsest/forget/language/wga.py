"""WGA: gradient ascent that weighs every token by how well it is still known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from palimpsest.core.needs import Need
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.objective import Context, Losses, Step, Term
from palimpsest.forget.objectives import wga_loss
from palimpsest.forget.terms import BalancedMethod


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
class WGA(BalancedMethod):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("beta", self.beta, 0, math.inf)

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The two terms of a step."""

        def losses(step: Step) -> Losses:
            logits = context.task.logits(context.model, step.forget)
            forget = Term(wga_loss(logits, step.forget["labels"], self.beta), "token")
            return self.balanced(context, step, forget)

        return losses
