"""FLAT: forget with forget data only, by answering with templates instead."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, shorten
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.gradient import GradientMethod
from palimpsest.forget.language.alternates import drawn
from palimpsest.forget.language.flat_divergences import (
    DIVERGENCES,
    TokenReduction,
    divergence_named,
    mean_probability,
)
from palimpsest.forget.objective import Context, Losses, Step, Term
from palimpsest.parts.refusals import refusals_of
from palimpsest.parts.tokens import token_counts
from palimpsest.tasks.language import Language

TEMPLATE = "template_"
"""Before the names of a batch's tensors of the template side."""


@unlearner(
    "flat",
    needs={Need.MODEL, Need.FORGET_DATA},
    tasks=("language",),
    paper=Paper("LLM Unlearning via Loss Adjustment with Only Forget Data", "ICLR 2025", "2410.11143"),
    search={
        "divergence": Choice(tuple(name for name, each in DIVERGENCES.items() if each.right_way)),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(5, 40, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class FLAT(GradientMethod):
    """Push the answer to forget down and a template answer up, coupled by an f-divergence that weighs them.

    With P_f and P_e the mean probabilities (not log-likelihoods) of the tokens of the answer to forget and of
    a template ("I don't know that."), the variational estimate g*(P_e) - f*(g*(P_f)) of a divergence between
    the two is maximised. It is bounded, so training long does no more harm than training enough. Reads neither
    retained records nor a reference model: use it where only the request itself is at hand. The price is a
    gradient that vanishes with the probability: a template on which the model has no mass at all starts slowly.

    For every forget record a template is drawn anew each time that it is read. Question and answer, question
    and template go through the model separately, and gradients flow into both passes. Of running text a
    prompt is what stands before a place that is drawn anew too; what follows is the answer.

    As published: AdamW with weight decay 0.01, linear schedule with a warm-up of one epoch but at least two
    steps, all parameters, 5 epochs of batches of 16 accumulated 4 times. Published learning rates (1e-5,
    2e-7) belong to reduction="padded" and models of billions of parameters; small ones want 1e-4 to 1e-3.

    Deviations: probabilities are averaged over the tokens of the answers (`reduction`); the released code
    divides by the length that everything is padded to, 10 times more for answers of 50 tokens, so that
    the curvature of the divergence is never felt and the learning rate depends on the padding. Templates
    always come from the list: one of the released scripts draws them from a corpus instead, which is no
    longer forget data only. Three of the eight divergences, as published, fall as the template becomes
    LESS likely; they are refused unless `allow_reversed` says that this is meant.

    Attributes:
        divergence: One of `flat_divergences.DIVERGENCES`.
        reduction: "answer": mean over the answers' tokens. "padded": as released, over `length` positions.
        length: That the released code pads to (500); for reduction="padded" only.
        templates: Answers to give instead: a list, or a text file with one on each line; by default our own.
        allow_reversed: Accept the divergences that push the wrong way.
    """

    epochs: int = 5
    accumulate: int = 4
    divergence: str = "total-variation"
    reduction: TokenReduction = "answer"
    length: int = 500
    templates: str | Sequence[str] | None = None
    allow_reversed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        divergence_named(self.divergence, self.allow_reversed)
        if self.reduction not in ("answer", "padded"):
            raise InvalidHyperparameter(f"reduction is 'answer' or 'padded', not {self.reduction!r}.")
        check_range("length", self.length, 2, float("inf"))
        _ = refusals_of(self.templates)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> nn.Module:
        """A new model, by `GradientUnlearner`; the warm-up takes at least two steps, unless there is none.

        Raises:
            InvalidRecords: If a prompt with its answer, or with the longest template, is too long.
            NonFiniteLoss: If the loss becomes NaN or Inf.
        """
        self._check(model, split.forget, task)
        least = 2 / self.steps_per_epoch(len(split.forget)) if self.warmup else 0.0
        warmer = dataclasses.replace(self, warmup=max(self.warmup, least))
        return super(FLAT, warmer).unlearn(model, split, task, runtime)

    def collate(self, context: Context, items: Sequence[dict[str, Any]], epoch: int) -> Batch:
        """Prompts with the answers to forget, and beside them ("template_...") the same prompts with templates.

        Which template, and where running text is cut, depends on the seed, the record and the epoch alone.

        Raises:
            InvalidRecords: If nothing of an answer is left to score.
        """
        task, templates = context.task, refusals_of(self.templates)
        longest, most = self._longest(context.model, task), _most(templates, task)
        rows: list[list[int]] = []
        others: list[list[int]] = []
        starts: list[int] = []
        for item in items:
            template = drawn(templates, context.runtime, item["id"], epoch)
            if item.get("question") is None:
                ids, first = task.encode(None, item["text"])
                room = max(1, min(len(ids) - first, longest - most - first + 1))
                start = first + context.runtime.derive("flat cut", item["id"], epoch) % room
                other = [*ids[:start], *_ending(template, task)]
            else:
                ids, start = task.encode(item["question"], item["answer"])
                other = task.encode(item["question"], template)[0]
            rows.append(ids)
            others.append(other)
            starts.append(start)
        beside = {f"{TEMPLATE}{name}": tensor for name, tensor in task.padded(others, starts).items()}
        batch: Batch = {"id": [item["id"] for item in items], **task.padded(rows, starts), **beside}
        empty = [
            items[at]["id"] for at, count in enumerate(token_counts(batch["labels"]).tolist()) if not count
        ]
        if empty:
            raise InvalidRecords(f"No token of the answer is left in records {shorten(empty)}.")
        return batch

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The loss of a step: one pass over the answers to forget, one over the templates."""
        divergence = divergence_named(self.divergence, self.allow_reversed)

        def losses(step: Step) -> Losses:
            beside = {
                name.removeprefix(TEMPLATE): value
                for name, value in step.forget.items()
                if name.startswith(TEMPLATE)
            }
            template = self.probability(context, beside)
            return Losses(Term(divergence.loss(template, self.probability(context, step.forget))))

        return losses

    def probability(self, context: Context, batch: Batch) -> Float[Tensor, ""]:
        """Mean probability of the answers' tokens, in the chosen reduction."""
        labels = batch["labels"]
        mean = mean_probability(context.task.logits(context.model, batch), labels, self.reduction)
        return mean if self.reduction == "answer" else mean * (labels.shape[1] - 1) / (self.length - 1)

    def _check(self, model: nn.Module, forget: Records, task: Language) -> None:
        """Check every pair before any work: lengths, and templates that are no alternative."""
        templates = refusals_of(self.templates)
        most, longest = _most(templates, task), self._longest(model, task)
        same: list[str] = []
        for item in forget:
            question = item.get("question")
            ids, start = task.encode(question, item["text"] if question is None else item["answer"])
            if len(ids) <= max(start, 1):
                raise InvalidRecords(f"The answer of record {item['id']!r} tokenizes to nothing.")
            needed = max(len(ids), start + most)
            if needed > longest:
                raise InvalidRecords(
                    f"Record {item['id']!r} needs {needed} tokens with its answer or the longest template, and "
                    f"{longest} fit: shorten it, or the templates."
                )
            if item.get("answer") in templates:
                same.append(item["id"])
        if same:
            warnings.warn(f"Templates are themselves the answers of records {shorten(same)}.", stacklevel=3)

    def _longest(self, model: nn.Module, task: Language) -> int:
        """Most tokens that a sequence may have."""
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        limits = (task.max_length, context, self.length if self.reduction == "padded" else None)
        return min((limit for limit in limits if limit), default=1 << 30)


def _most(templates: Sequence[str], task: Language) -> int:
    """Tokens of the longest template."""
    return max(len(_ending(template, task)) for template in templates)


def _ending(template: str, task: Language) -> list[int]:
    """Tokens of a template that follows a prompt."""
    return task.tokens(task.form.complete(template)) + task.tokens(task.form.ending)
