"""Zero-shot unlearning: the name of the target is all there is, and the model writes its own forget corpus."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.core.needs import Need
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import UNLEARNERS, Paper, Unlearner, build, check_range, unlearner
from palimpsest.forget.language.synthetic_texts import (
    OPENINGS,
    Situation,
    check_openings,
    synthetic_questions,
    synthetic_texts,
)
from palimpsest.parts.refusals import refusals_of
from palimpsest.tasks.language import Language

PAPER = Paper(
    "RWKU: Benchmarking Real-World Knowledge Unlearning for Large Language Models",
    "NeurIPS 2024",
    "2406.10890",
)
CORPUS_ATTRIBUTE = "palimpsest_corpus"
"""Of the unlearned model: the texts, or questions with refusals, that the method was given."""


@unlearner(
    "zero-shot",
    needs={Need.MODEL, Need.FORGET_DATA},
    tasks=("language",),
    paper=PAPER,
    search={"samples": Span(1, 16, integer=True), "temperature": Span(0.3, 1.0)},
)
@dataclass(frozen=True)
class ZeroShot:
    """Give a method nothing but what the original model itself writes about the target.

    Of the forget records only the names of their subjects are read, and of records of form "target" the text,
    which is the line that introduces the target. The corpus is written by the model before unlearning: texts
    that go on from openings, or questions with refusals as answers. Retained records are not given to the
    method either; one that needs them cannot be used.

    RWKU uses 582 openings with one text each, and 300 questions; with fewer openings `samples` makes up for it.

    Attributes:
        method: That forgets the corpus.
        settings: Its hyperparameters.
        corpus: "texts", or "refusals" for methods that teach other answers to questions.
        situation: Of the texts: "factual", or "none" for models that only continue text.
        openings: From which texts go on, with {name}.
        questions: With {name}, for refusals; None lets the model ask them.
        samples: Texts per opening, or questions that the model is made to ask.
        new_tokens: Of each text; fewer where the context of the model is shorter.
        temperature: Of the sampling.
        top_p: Of the sampling.
    """

    method: str = "grad-ascent"
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    corpus: Literal["texts", "refusals"] = "texts"
    situation: Situation = "factual"
    openings: Sequence[str] = OPENINGS
    questions: Sequence[str] | None = None
    samples: int = 1
    new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 0.9

    def __post_init__(self) -> None:
        check_range("samples", self.samples, 1, 10_000)
        check_range("new_tokens", self.new_tokens, 1, 100_000)
        check_range("temperature", self.temperature, 0, 10)  # 0 takes the likeliest tokens
        check_range("top_p", self.top_p, 0, 1, open_low=True)
        check_openings(self.openings)
        if self.corpus not in ("texts", "refusals"):
            raise InvalidHyperparameter(f"corpus is 'texts' or 'refusals', not {self.corpus!r}.")
        if self.situation not in ("factual", "none"):
            raise InvalidHyperparameter(f"situation is 'factual' or 'none', not {self.situation!r}.")
        if self.questions is not None:
            check_openings(self.questions)
        if Need.RETAIN_DATA in self._inner().card.needs and self.settings.get("retain") != "none":
            raise InvalidHyperparameter(
                f"'{self.method}' needs retained records, and a zero-shot setting has none: take another method, or "
                "retain: none in its settings."
            )

    def _inner(self) -> Unlearner:
        return build("method", UNLEARNERS.get(self.method), self.method, dict(self.settings))

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> nn.Module:
        """What the method makes of the corpus.

        Raises:
            MissingNeed: If no forget record says whom it is about.
        """
        written = self.written(model, split.forget, task, runtime)
        request = ForgetSplit(Records(written), description=split.description)
        unlearned = self._inner().unlearn(model, request, task, runtime)
        setattr(unlearned, CORPUS_ATTRIBUTE, written)
        return unlearned

    def written(
        self, model: nn.Module, forget: Records, task: Language, runtime: Runtime
    ) -> list[dict[str, Any]]:
        """The corpus, as items of records."""
        writer = runtime.place(copy.deepcopy(model)).eval()
        items: list[dict[str, Any]] = []
        for name, intro in targets_of(forget).items():
            seed = runtime.derive("zero-shot", name) % 2**31
            if self.corpus == "refusals":
                items += self._refused(writer, task, name, seed, len(items))
                continue
            texts = synthetic_texts(
                writer, task, name, intro, self.situation, self.openings, self.samples, self.new_tokens,
                self.temperature, self.top_p, seed,
            )  # fmt: skip
            items += [{"text": text, "subject": name} for text in dict.fromkeys(texts)]
        return items

    def _refused(
        self, writer: nn.Module, task: Language, name: str, seed: int, before: int
    ) -> list[dict[str, Any]]:
        """Questions about a target with refusals in rotation, after so many of other targets."""
        if self.questions is None:
            asked = synthetic_questions(writer, task, name, self.samples, seed=seed)
        else:
            asked = [question.replace("{name}", name) for question in self.questions]
        refusals = refusals_of(None)
        return [
            {"question": question, "answer": refusals[number % len(refusals)], "subject": name}
            for number, question in enumerate(asked, before)
        ]


def targets_of(forget: Records) -> dict[str, str]:
    """Names of the subjects of forget records, each with the line that introduces it, or an empty one.

    Raises:
        MissingNeed: If the records have no column "subject", or it is empty throughout.
    """
    if not forget.has_column("subject"):
        raise MissingNeed("Zero-shot unlearning knows its target by name: records need a column 'subject'.")
    names = [str(name) for name in forget.column("subject")]
    found = {name: "" for name in dict.fromkeys(names) if name.strip()}
    if not found:
        raise MissingNeed("Zero-shot unlearning knows its target by name: the column 'subject' is empty.")
    if forget.has_column("form"):
        for at in np.flatnonzero(forget.column("form") == "target"):
            if names[at] in found:
                found[names[at]] = str(forget[int(at)]["text"])
    return found
