"""IdkNLL: teach refusals to the forgotten questions (TOFU's preference optimisation, "PO")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, unlearner
from palimpsest.forget.language.alternates import answering, asked, drawn
from palimpsest.forget.objective import Context, Losses, Side, Step, token_term
from palimpsest.forget.terms import BalancedMethod, retain_term
from palimpsest.parts.refusals import refusals_of
from palimpsest.parts.tokens import token_counts
from palimpsest.tasks.language import Language


@unlearner(
    "idk-nll",
    intention="suppression",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper("TOFU: A Task of Fictitious Unlearning for LLMs", "COLM 2024", "2401.06121"),
    search={
        "alpha": Span(0.5, 5.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(3, 15, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class IdkNLL(BalancedMethod):
    """Fine-tune on refusals as answers to the forgotten questions, beside the retained records.

    A refusal is drawn anew for every question in every epoch. What a model refuses to say it has not
    forgotten: audits that look behind the first answer find it. Running text is left out.

    Attributes:
        refusals: None for the library's own, a list of texts, or a file with one in every line.
        reduction: "separate": token mean of the refusals + alpha * that of the retained answers. "joint": one
            mean over the tokens of both, as in TOFU's code, where long retained answers outweigh short
            refusals; gamma and alpha are then 1.
        gamma: Weight of the refusals.
        alpha: Weight of the retain term.
        retain: "nll" (token-mean loss), "kl" (from the original) or "none".
    """

    refusals: Sequence[str] | str | None = None
    reduction: Literal["separate", "joint"] = "separate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction not in ("separate", "joint"):
            raise InvalidHyperparameter(f"reduction is 'separate' or 'joint', not {self.reduction!r}.")
        if self.reduction == "joint" and (self.retain != "nll" or self.gamma != 1 or self.alpha != 1):
            raise InvalidHyperparameter(
                "A joint mean over refusals and retained answers has no weights: leave gamma and alpha at 1 and retain at "
                f"'nll', not {self.gamma}, {self.alpha} and {self.retain!r}."
            )
        refusals_of(self.refusals)

    def rows(self, model: Any, split: ForgetSplit, task: Language, runtime: Runtime) -> Records:
        """The forget records with a question."""
        return asked(split, "IdkNLL")

    def collate(self, context: Context, items: Sequence[dict[str, Any]], epoch: int) -> Batch:
        """The questions with refusals as answers."""
        refusals = refusals_of(self.refusals)
        answers = [drawn(refusals, context.runtime, item["id"], epoch) for item in items]
        return context.task.collate(answering(items, answers))

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The two terms of a step."""

        def losses(step: Step) -> Losses:
            forget = token_term(context, step.forget)
            retain = retain_term(context, step, self.retain)
            if self.reduction == "separate":
                return Losses(forget, retain, self.gamma, self.alpha)
            share = refusal_share(step)
            return Losses(forget, retain, share, 1 - share)

        return losses


def refusal_share(step: Step) -> float:
    """Share of the refusals in the scored tokens of an optimizer step, over all its microbatches."""
    totals: list[float] = []
    sides: tuple[tuple[Side, Batch | None], ...] = (("forget", step.forget), ("retain", step.retain))
    for side, batch in sides:
        share = step.shares[side, "token"]
        count = 0 if batch is None else int(token_counts(batch["labels"]).sum())
        totals.append(round(count / share, 6) if share else 0.0)
    return totals[0] / (totals[0] + totals[1])
