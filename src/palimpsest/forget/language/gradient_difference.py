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
from palimpsest.forget.terms import Retain, answer_losses, check_retain, retain_term


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
class GradientDifference(GradientMethod):
    """Ascend on the token-mean loss of forget answers while descending on retained ones.

    With retain="kl" it is the KL minimisation of TOFU (GA + KL). The ascent has no bound.

    Attributes:
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
        retain: "nll" (token-mean loss), "kl" (from the original) or "none".
    """

    gamma: float = 1.0
    alpha: float = 1.0
    retain: Retain = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_retain(self.retain, self.gamma, self.alpha)

    @property
    def needs_original(self) -> bool:
        """Only for the KL retain term."""
        return self.retain == "kl"

    @property
    def needs_retain(self) -> bool:
        """Unless there is no retain term."""
        return self.retain != "none"

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The two terms of a step."""

        def losses(step: Step) -> Losses:
            forget = Term(gradient_ascent_loss(*answer_losses(context, step.forget)), "token")
            return Losses(forget, retain_term(context, step, self.retain), self.gamma, self.alpha)

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
