"""Gradient ascent on forget answers, alone or against a retain term (GradAscent, GradDiff, KL-min)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from palimpsest.core.needs import Need
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper, unlearner
from palimpsest.forget.gradient import GradientMethod
from palimpsest.forget.objective import Context, Losses, Step, Term
from palimpsest.forget.objectives import gradient_ascent_loss
from palimpsest.forget.terms import BalancedMethod, answer_losses


@unlearner(
    "grad-diff",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper("Continual Learning and Private Unlearning", "CoLLAs 2022", "2203.12817"),
    search={
        "alpha": Span(0.5, 5.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(3, 15, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class GradientDifference(BalancedMethod):
    """Ascend on the token-mean loss of forget answers while descending on retained ones.

    With retain="kl" it is the KL minimisation of TOFU (GA + KL). The ascent has no bound.

    Attributes:
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
        retain: "nll" (token-mean loss), "kl" (from the original) or "none".
    """

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The two terms of a step."""

        def losses(step: Step) -> Losses:
            forget = Term(gradient_ascent_loss(*answer_losses(context, step.forget)), "token")
            return self.balanced(context, step, forget)

        return losses


@unlearner(
    "grad-ascent",
    needs={Need.MODEL, Need.FORGET_DATA},
    tasks=("language",),
    paper=Paper(
        "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", "ACL 2023", "2210.01504"
    ),
    search={"lr": Span(1e-5, 1e-3, log=True), "epochs": Span(1, 10, integer=True)},
)
@dataclass(frozen=True, kw_only=True)
class GradientAscent(GradientMethod):
    """Ascend on the token-mean loss of forget answers, and nothing else; run long, it ruins the model."""

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The term of a step."""

        def losses(step: Step) -> Losses:
            return Losses(Term(gradient_ascent_loss(*answer_losses(context, step.forget)), "token"))

        return losses
