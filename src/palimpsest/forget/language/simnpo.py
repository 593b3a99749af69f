"""SimNPO: negative preference optimisation without a reference model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from palimpsest.core.needs import Need
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.objective import Context, Losses, Step, Term
from palimpsest.forget.objectives import simnpo_loss
from palimpsest.forget.terms import BalancedMethod, answer_losses


@unlearner(
    "simnpo",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper(
        "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
        "NeurIPS 2025",
        "2410.07163",
    ),
    search={
        "beta": Span(2.5, 5.5),
        "delta": Span(0.0, 1.0),
        "gamma": Span(0.05, 1.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(3, 15, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class SimNPO(BalancedMethod):
    """Make forget answers unlikely per token, with a force that fades once they are: no reference model.

    The loss is -(2/beta) log sigmoid(beta (l - delta)) with l the mean token loss of the answer: short and long
    answers weigh alike, and an answer that was hardly known to begin with is hardly pushed.

    Attributes:
        beta: Inverse temperature; 2.5 to 4.5 are published.
        delta: Loss per token from which on an answer counts as forgotten (called gamma in the paper).
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
        retain: "nll" (token-mean loss), "kl" (from the original) or "none".
    """

    beta: float = 4.5
    delta: float = 0.0
    gamma: float = 0.125

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("beta", self.beta, 0, math.inf, open_low=True)
        check_range("delta", self.delta, 0, math.inf)

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The two terms of a step."""

        def losses(step: Step) -> Losses:
            answers, counts = answer_losses(context, step.forget)
            forget = Term(simnpo_loss(answers, counts, self.beta, self.delta))
            return self.balanced(context, step, forget)

        return losses
