"""IdkDPO: prefer a refusal to the true answer, by direct preference optimisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.language.alternates import (
    ALTERNATE,
    alternate_batch,
    alternate_references,
    asked,
    drawn,
)
from palimpsest.forget.objective import Context, Losses, Step, Term
from palimpsest.forget.objectives import dpo_loss
from palimpsest.forget.terms import (
    BalancedMethod,
    Retain,
    answer_losses,
    references,
    retain_term,
)
from palimpsest.parts.refusals import refusals_of
from palimpsest.tasks.language import Language


@unlearner(
    "idk-dpo",
    intention="suppression",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper(
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "NeurIPS 2023",
        "2305.18290",
    ),
    search={
        "beta": Span(0.05, 0.5, log=True),
        "alpha": Span(0.5, 5.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(3, 15, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class IdkDPO(BalancedMethod):
    """Raise a refusal and lower the true answer, each measured against the original.

    -(2/beta) log sigmoid(beta (r(refusal) - r(answer))), r = log p / p_original of a whole answer; the factor
    2/beta as in NPO. A refusal is drawn anew for every question in every epoch. The original's likelihoods of
    answers and refusals are computed once, so no second model is kept. Running text is left out.

    Attributes:
        refusals: None for the library's own, a list of texts, or a file with one in every line.
        beta: Inverse temperature.
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
        retain: "nll" (token-mean loss), "kl" (from the original) or "none".
    """

    refusals: Sequence[str] | str | None = None
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("beta", self.beta, 0, math.inf, open_low=True)
        refusals_of(self.refusals)

    def rows(self, model: Any, split: ForgetSplit, task: Language, runtime: Runtime) -> Records:
        """The forget records with a question."""
        return asked(split, "IdkDPO")

    def collate(self, context: Context, items: Sequence[dict[str, Any]], epoch: int) -> Batch:
        """The questions with their answers, and a refusal beside each."""
        refusals = refusals_of(self.refusals)
        refused = [drawn(refusals, context.runtime, item["id"], epoch) for item in items]
        return {**context.task.collate(items), ALTERNATE: refused}

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """Look up the original's likelihoods, then the two terms of a step."""
        refusals, runtime = refusals_of(self.refusals), context.runtime
        pairs = [
            (item["question"], drawn(refusals, runtime, item["id"], epoch))
            for item in context.split.forget
            for epoch in range(context.epochs)
        ]
        return preference(
            context, alternate_references(context, pairs), self.beta, self.retain, self.gamma, self.alpha
        )


def preference(
    context: Context,
    chosen_reference: Callable[[Batch], Any],
    beta: float,
    retain: Retain,
    gamma: float,
    alpha: float,
) -> Callable[[Step], Losses]:
    """The terms of a step that prefers the alternates of a batch to its answers."""
    rejected_reference = references(context, context.split.forget)

    def losses(step: Step) -> Losses:
        chosen, _ = answer_losses(context, alternate_batch(context, step.forget))
        rejected, _ = answer_losses(context, step.forget)
        loss = dpo_loss(
            chosen, chosen_reference(step.forget), rejected, rejected_reference(step.forget), beta
        )
        return Losses(Term(loss), retain_term(context, step, retain), gamma, alpha)

    return losses
