"""FLAT: forget with forget data only, by answering with templates instead."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, shorten
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.gradient import Context, GradientMethod, Losses, Step, Term
from palimpsest.forget.language.flat_divergences import (
    DIVERGENCES,
    TokenReduction,
    divergence_named,
    mean_probability,
)
from palimpsest.parts.refusals import refusals_of
from palimpsest.parts.tokens import token_counts
from palimpsest.tasks.language import Language


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
        """A new model, by `GradientUnlearner`; the warm-up takes at least two steps, unless there is none."""
        least = 2 / self.steps_per_epoch(len(split.forget)) if self.warmup else 0.0
        return super(FLAT, dataclasses.replace(self, warmup=max(self.warmup, least))).unlearn(
            model, split, task, runtime
        )

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """Check that every pair fits, then the loss of a step.

        Raises:
            InvalidRecords: If a question with the longest template does not fit into the context.
        """
        pairs = Pairs(context, refusals_of(self.templates), self._longest(context.model, context.task))
        divergence = divergence_named(self.divergence, self.allow_reversed)

        def losses(step: Step) -> Losses:
            forgotten, template = pairs.of(step.forget)
            means = [
                self.probability(context.task.logits(context.model, batch), batch)
                for batch in (forgotten, template)
            ]
            return Losses(Term(divergence.loss(means[1], means[0])))

        return losses

    def probability(self, logits: Float[Tensor, "batch tokens vocabulary"], batch: Batch) -> Tensor:
        """Mean probability of the answers' tokens, in the chosen reduction."""
        mean = mean_probability(logits, batch["labels"], self.reduction)
        tokens = batch["labels"].shape[1]
        return mean if self.reduction == "answer" else mean * (tokens - 1) / (self.length - 1)

    def _longest(self, model: nn.Module, task: Language) -> int:
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        own = self.length if self.reduction == "padded" else None
        return min((limit for limit in (context, task.max_length, own) if limit), default=1 << 30)


class Pairs:
    """Forget records beside the same prompts with template answers, both drawn anew at every reading.

    Args:
        context: Of the run.
        templates: To draw from.
        longest: Most tokens of a sequence.

    Raises:
        InvalidRecords: If a prompt with the longest template is longer, naming the record.
    """

    def __init__(self, context: Context, templates: Sequence[str], longest: int):
        self.task, self.runtime, self.templates = context.task, context.runtime, tuple(templates)
        self.draw = context.runtime.generator("flat templates")
        most = max(len(self._ending(template)) for template in self.templates)
        same = [item["id"] for item in context.split.forget if item.get("answer") in self.templates]
        if same:
            warnings.warn(f"The answers of records {shorten(same)} are templates themselves.", stacklevel=2)
        for item in context.split.forget:
            ids, start = self._encoded(item)
            needed = max(len(ids), start + most)
            if needed > longest:
                raise InvalidRecords(
                    f"Record {item['id']!r} with its answer, or the longest template, has {needed} tokens and "
                    f"{longest} fit: shorten it or the templates."
                )

    def of(self, batch: Batch) -> tuple[Batch, Batch]:
        """Prompts with the answers to forget, and the same prompts with templates."""
        rows: list[list[int]] = []
        others: list[list[int]] = []
        starts: list[int] = []
        for number in range(len(batch["id"])):
            item = {key: batch[key][number] for key in ("question", "answer", "text") if key in batch}
            ids, start = self._encoded(item)
            if item.get("question") is None:
                start += int(torch.randint(max(len(ids) - start - 1, 1), (), generator=self.draw))
                other = [*ids[:start], *self._ending(self._drawn())]
            else:
                other, start = self.task.encode(item["question"], self._drawn())
            rows.append(ids)
            others.append(other)
            starts.append(start)
        return self._batch(batch, rows, starts), self._batch(batch, others, starts)

    def _batch(self, batch: Batch, rows: list[list[int]], starts: list[int]) -> Batch:
        made: Batch = {"id": batch["id"], **self.task.padded(rows, starts)}
        empty = [name for name, count in zip(batch["id"], token_counts(made["labels"]), strict=True) if not count]
        if empty:
            raise InvalidRecords(f"No token of the answer is left in records {shorten(empty)}.")
        return self.runtime.to_device(made)

    def _drawn(self) -> str:
        return self.templates[int(torch.randint(len(self.templates), (), generator=self.draw))]

    def _encoded(self, item: Mapping[str, Any]) -> tuple[list[int], int]:
        question = item.get("question")
        return self.task.encode(question, item["text"] if question is None else item["answer"])

    def _ending(self, template: str) -> list[int]:
        """Tokens of a template that follows a prompt."""
        return self.task.tokens(self.task.form.complete(template)) + self.task.tokens(self.task.form.ending)
