"""SatImp: gradient ascent that weighs tokens by saturation and importance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from palimpsest.core.needs import Need
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.objective import Context, Losses, Step, Term
from palimpsest.forget.objectives import satimp_loss
from palimpsest.forget.terms import BalancedMethod


@unlearner(
    "satimp",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper(
        "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", "ICML 2025", "2505.11953"
    ),
    search={
        "beta1": Span(1.0, 6.0),
        "beta2": Span(0.5, 2.0),
        "gamma": Span(0.1, 10.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(3, 15, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class SatImp(BalancedMethod):
    """Ascend on forget answers with weights p^beta1 (1 - p)^beta2 per token, detached.

    The first factor leaves alone what is forgotten already (saturation), the second what any model would
    say (importance): a token of probability near 1 pulls as little as one near 0, and with beta1 = 5 and
    beta2 = 1 those at 5/6 pull most.

    The released class and its configuration swap gamma and alpha; the paper's ratio of forget to retain is 10
    to 1, which is the default here (gamma 1, alpha 0.1, as in the class).

    Attributes:
        beta1: Exponent of p.
        beta2: Exponent of 1 - p.
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
        retain: "nll" (token-mean loss), "kl" (from the original) or "none".
    """

    beta1: float = 5.0
    beta2: float = 1.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("beta1", self.beta1, 0, math.inf)
        check_range("beta2", self.beta2, 0, math.inf)

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The two terms of a step."""

        def losses(step: Step) -> Losses:
            logits = context.task.logits(context.model, step.forget)
            forget = satimp_loss(logits, step.forget["labels"], self.beta1, self.beta2)
            return self.balanced(context, step, Term(forget, "token"))

        return losses
