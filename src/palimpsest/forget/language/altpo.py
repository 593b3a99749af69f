"""AltPO: prefer plausible wrong answers, which the model itself writes, to the true one."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, shorten
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.language.alternates import ALTERNATE, alternate_references, asked
from palimpsest.forget.language.idk_dpo import preference
from palimpsest.forget.objective import Context, Losses, Step
from palimpsest.forget.terms import BalancedMethod
from palimpsest.tasks.language import Language

INSTRUCTION = "{question}\nA true answer is: {answer}\nWrite another answer that is just as plausible but changes all facts."
"""What the model is asked, within the template of the task."""
STOPS = re.compile(r"Question:|Q:")
ROUNDS = 4
"""So often is a question asked again if it has too few alternates."""


@unlearner(
    "altpo",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper(
        "Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models",
        "COLING 2025",
        "2409.13474",
    ),
    search={
        "beta": Span(0.05, 0.5, log=True),
        "alpha": Span(0.5, 5.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(1, 5, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class AltPO(BalancedMethod):
    """Raise plausible wrong answers and lower the true one, each measured against the original.

    The loss is IdkDPO's, with in-domain alternates in the place of refusals, so that the model goes on to
    answer like one that never knew. Every alternate is a row of its own: an epoch is as many times longer.
    Alternates that repeat the true answer or each other are thrown away. Running text is left out, and so,
    with a warning, are questions that are left without any.

    Attributes:
        alternates: "sampled": written by the model when it is told the question and the true answer.
            "given": the records' own `perturbed_answer`.
        count: Alternates per question; of given ones at most so many.
        instruction: What the model is told, with {question} and, if it shall see it, {answer}. A model
            that is not tuned to follow instructions may be asked the plain "{question}".
        temperature: Of the sampling.
        max_new_tokens: Longest alternate.
        beta: Inverse temperature of the preference.
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
        retain: "nll" (token-mean loss), "kl" (from the original) or "none".
    """

    epochs: int = 2
    alternates: Literal["sampled", "given"] = "sampled"
    count: int = 5
    instruction: str = INSTRUCTION
    temperature: float = 1.0
    max_new_tokens: int = 200
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alternates not in ("sampled", "given"):
            raise InvalidHyperparameter(f"alternates is 'sampled' or 'given', not {self.alternates!r}.")
        if "{question}" not in self.instruction:
            raise InvalidHyperparameter(f"The instruction has no {{question}}: {self.instruction!r}.")
        for name in ("count", "max_new_tokens"):
            check_range(name, getattr(self, name), 1, math.inf)
        for name in ("beta", "temperature"):
            check_range(name, getattr(self, name), 0, math.inf, open_low=True)

    def rows(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> Records:
        """A row for every alternate of every question.

        Raises:
            InvalidRecords: If no question has an alternate.
        """
        items = list(asked(split, "AltPO"))
        found = (
            given(items, self.count)
            if self.alternates == "given"
            else self.sampled(model, items, task, runtime)
        )
        check_alternates(items, found, self.alternates)
        rows: list[dict[str, Any]] = []
        names: list[str] = []
        for item, alternates in zip(items, found, strict=True):
            for number, alternate in enumerate(alternates):
                rows.append({key: value for key, value in item.items() if key not in ("id", "index")})
                rows[-1][ALTERNATE] = alternate
                names.append(f"{item['id']}#{number}")
        return Records(rows, ids=names)

    def sampled(
        self, model: nn.Module, items: Sequence[dict[str, Any]], task: Language, runtime: Runtime
    ) -> list[list[str]]:
        """Alternates that the model writes, up to `count` different ones per item."""
        asked = [
            self.instruction.replace("{question}", item["question"]).replace("{answer}", item["answer"])
            for item in items
        ]
        room = _room(model, task, asked)
        found: list[list[str]] = [[] for _ in items]
        for attempt in range(ROUNDS):
            short = [at for at, alternates in enumerate(found) if len(alternates) < self.count]
            if not short:
                break
            written = task.generate(
                model, [asked[at] for at in short], max_new_tokens=max(1, min(self.max_new_tokens, room)),
                temperature=self.temperature, samples=self.count,
                seed=runtime.derive("alternates", attempt),
            )  # fmt: skip
            for at, texts in zip(short, written, strict=True):
                cut = [STOPS.split(text)[0].strip() for text in texts]
                found[at] = distinct([*found[at], *cut], items[at]["answer"])[: self.count]
        return found

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """Look up the original's likelihoods, then the two terms of a step."""
        pairs = [(item["question"], item[ALTERNATE]) for item in context.split.forget]
        chosen = alternate_references(context, pairs)
        return preference(context, chosen, self.beta, self.retain, self.gamma, self.alpha)

    def collate(self, context: Context, items: Sequence[dict[str, Any]], epoch: int) -> Batch:
        """The questions with their answers, and the alternate of the row beside each."""
        return context.task.collate(items)


def check_alternates(
    items: Sequence[dict[str, Any]], found: Sequence[Sequence[str]], kind: Literal["sampled", "given"]
) -> None:
    """Warn of questions without alternates.

    Raises:
        InvalidRecords: If no question has one.
    """
    bare = [item["id"] for item, alternates in zip(items, found, strict=True) if not alternates]
    if not bare:
        return
    todo = (
        "Add perturbed_answer to the records, or take alternates='sampled'."
        if kind == "given"
        else "The model repeats the true answer or says nothing: raise the temperature, change the instruction, or give "
        "perturbed_answer and alternates='given'."
    )
    said = (
        f"{len(bare)} of {len(items)} questions to forget have no alternate answer: {shorten(bare)}. {todo}"
    )
    if len(bare) == len(items):
        raise InvalidRecords(said)
    warnings.warn(f"{said} They are left out.", stacklevel=2)


def given(items: Sequence[dict[str, Any]], count: int) -> list[list[str]]:
    """The `perturbed_answer` of every item: the first `count` different ones."""
    return [distinct(item.get("perturbed_answer") or [], item["answer"])[:count] for item in items]


def distinct(texts: Sequence[str], truth: str) -> list[str]:
    """The texts without empty ones, repetitions and the truth; letter case, blanks and end stops set aside.

    Example:
        >>> distinct(["Rome.", "rome", "", "Oslo"], "oslo.")
        ['Rome.']
    """
    seen = {_plain(truth), ""}
    return [text for text in texts if not (_plain(text) in seen or seen.add(_plain(text)))]


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".!")


def _room(model: nn.Module, task: Language, asked: Sequence[str]) -> int:
    """Tokens that the context has left after the longest prompt."""
    longest = max(len(task.prompt(text)) for text in asked)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or math.inf
    if longest >= limit:
        raise InvalidRecords(
            f"The instruction with question and answer takes {longest} tokens, the context has {limit}: shorten it."
        )
    return int(min(limit - longest, 1 << 20))
