"""NPO: negative preference optimisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from palimpsest.core.needs import Need
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.objective import Context, Losses, Step, Term
from palimpsest.forget.objectives import npo_loss
from palimpsest.forget.terms import (
    BalancedMethod,
    answer_losses,
    references,
)


@unlearner(
    "npo",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper(
        "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
        "COLM 2024",
        "2404.05868",
    ),
    search={
        "beta": Span(0.05, 0.5, log=True),
        "alpha": Span(0.5, 5.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(3, 15, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class NPO(BalancedMethod):
    """Make forget answers less likely than under the original, with a force that fades as they become so.

    The loss is -(2/beta) log sigmoid(beta (L - L_original)) with L the summed loss of the answer: gradient
    ascent weighted by 2 p^beta / (p^beta + p_original^beta). For beta to 0 it is gradient ascent. The likelihood
    under the original is computed once for every forget record, so no second model is kept (unless the retain
    term is "kl").

    Attributes:
        beta: Inverse temperature; 0.1 is published.
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
        retain: "nll" (token-mean loss), "kl" (from the original) or "none".
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("beta", self.beta, 0, math.inf, open_low=True)

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """Look up the original's likelihoods, then the two terms of a step."""
        reference = references(context, context.split.forget)

        def losses(step: Step) -> Losses:
            answers, _ = answer_losses(context, step.forget)
            forget = Term(npo_loss(answers, reference(step.forget), self.beta))
            return self.balanced(context, step, forget)

        return losses
