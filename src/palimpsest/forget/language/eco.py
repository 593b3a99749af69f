"""ECO: a frozen model that sees corrupted embeddings wherever a prompt asks for what is to be forgotten."""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch, UnknownName
from palimpsest.core.needs import Need
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Card, Paper, check_range, unlearner
from palimpsest.forget.language.corruption import (
    CORRUPTIONS,
    all_but_last,
    carry_labels,
    corrupt,
    zeroth_order_step,
)
from palimpsest.forget.language.prompt_classifier import PromptClassifier
from palimpsest.forget.language.prompt_reading import PromptReader, Read, rows_of
from palimpsest.forget.language.wrapped import Call, Wrapped, ask
from palimpsest.tasks.language import Language

Judge = Callable[[Sequence[str]], Any]
"""Probability of each text that it asks for what is to be forgotten."""
Picker = Callable[[str], list[tuple[int, int]]]
"""Where in a question the words stand that are to be corrupted: first and last character + 1."""
_OPENERS = """
    who what which where when why how whose whom is are was were do does did can could will would has have had
    in on at for of from to by with as the a an name tell give please question complete if and or
"""
OPENERS = frozenset(_OPENERS.split())
"""Words that a question begins with, which are no names."""


class ECOModel(Wrapped):
    """A model whose embeddings are corrupted at picked tokens of prompts that a classifier finds.

    Attributes:
        inner: The model, untouched.
        classifier: Of questions.
        strength: Of the corruption; 0 leaves every output as it is.
    """

    def __init__(self, inner: nn.Module, classifier: Judge, settings: ECO, task: Language, seed: int):
        super().__init__(inner)
        self.classifier, self.settings, self.strength = classifier, settings, settings.strength
        self.task, self.reader, self.seed = task, PromptReader(task), seed
        self._flags: dict[str, bool] = {}
        self._picks: dict[tuple[int, ...], tuple[bool, ...]] = {}

    def answer(self, call: Call) -> Any:
        """As the inner model, after corrupting the prompts that are flagged.

        Tokens that follow in cached decoding are never corrupted.
        """
        if not call.first or call.ids.shape[1] < 2 or (self.strength == 0 and self._scaled):
            return ask(self.inner, call)
        tokens = self.chosen(call.ids, call.attended)
        if not tokens.any():
            return ask(self.inner, call)
        prompts = [tuple(row) for row in rows_of(call.ids, call.attended)]

        def change(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return self.corrupted(output, tokens, call.attended.bool(), prompts)

        handle = self.get_input_embeddings().register_forward_hook(change)
        try:
            return ask(self.inner, call)
        finally:
            handle.remove()  # only this one: hooks of others stay

    @property
    def _scaled(self) -> bool:
        """Whether the strength has a meaning for the corruption."""
        return CORRUPTIONS[self.settings.corruption].change not in ("zero", "flip")

    def flagged(self, questions: Sequence[str]) -> list[bool]:
        """Which questions ask for what is to be forgotten."""
        new = [question for question in dict.fromkeys(questions) if question not in self._flags]
        if new:
            found = torch.as_tensor(self.classifier(new)).flatten().tolist()
            if len(found) != len(new):
                raise ModelMismatch(f"The classifier gave {len(found)} probabilities for {len(new)} prompts.")
            self._flags.update({q: p >= self.settings.threshold for q, p in zip(new, found, strict=True)})
        return [self._flags[question] for question in questions]

    def chosen(self, ids: Tensor, mask: Tensor) -> Bool[Tensor, "rows tokens"]:
        """The tokens that are corrupted."""
        reads = self.reader.read(ids, mask)
        found = torch.zeros(ids.shape, dtype=torch.bool)
        rows = rows_of(ids, mask)
        for row, flag in enumerate(self.flagged([read.question for read in reads])):
            if flag:
                real = mask[row].nonzero().flatten().cpu()
                prompt = rows[row][: reads[row].prompt]
                found[row, real[: len(prompt)]] = torch.tensor(self.picked(prompt, reads[row]))
        return found.to(ids.device)

    def picked(self, prompt: Sequence[int], read: Read) -> tuple[bool, ...]:
        """Which tokens of a prompt are corrupted: those that overlap a picked word, or all but the last."""
        key = tuple(prompt)
        if key not in self._picks:
            labels = self._overlapping(prompt, read) if read.templated else []
            if not any(labels):
                labels = all_but_last(torch.ones(1, len(prompt), dtype=torch.long))[0].tolist()
            self._picks[key] = tuple(bool(label) for label in labels)
        return self._picks[key]

    def _overlapping(self, prompt: Sequence[int], read: Read) -> list[int]:
        text = self.task.form.render(read.question)
        start = text.find(read.question)
        words = [(start + first, start + end) for first, end in self.settings.pick(read.question)]
        onto = offsets_of(self.task, text)
        special = len(prompt) - len(onto)  # a beginning token stands before the text
        return [0] * special + carry_labels([1] * len(words), words, onto)

    def corrupted(
        self,
        embeddings: Float[Tensor, "rows tokens dim"],
        tokens: Bool[Tensor, "rows tokens"],
        real: Bool[Tensor, "rows tokens"],
        prompts: Sequence[tuple[int, ...]],
    ) -> Float[Tensor, "rows tokens dim"]:
        """The embeddings with noise that depends on the prompt alone, wherever and beside whatever it stands."""
        settings = self.settings
        if CORRUPTIONS[settings.corruption].change != "noise":
            return corrupt(embeddings, tokens, settings.corruption, settings.dims, self.strength)
        found = embeddings.clone()
        for row in tokens.any(1).nonzero().flatten().tolist():
            own, end = real[row].nonzero().flatten(), int(tokens[row][real[row]].nonzero().max()) + 1
            at = own[:end]
            generator = torch.Generator().manual_seed(_seed(self.seed, prompts[row][:end]))
            found[row, at] = corrupt(
                embeddings[row : row + 1, at], tokens[row : row + 1, at],
                settings.corruption, settings.dims, self.strength, generator,
            )[0]  # fmt: skip
        return found


@unlearner(
    "eco",
    intention="suppression",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper(
        "Large Language Model Unlearning via Embedding-Corrupted Prompts", "NeurIPS 2024", "2406.07933"
    ),
    search={
        "strength": Span(0.1, 100.0, log=True),
        "dims": Span(1, 16, integer=True),
        "corruption": Choice(("noise-first", "zero-top", "flip-top")),
    },
)
@dataclass(frozen=True, kw_only=True)
class ECO:
    """Corrupt the embeddings of names in prompts that a classifier flags; the weights stay as they are.

    A guard: it costs no training of the model and removes nothing from it. Whoever takes it off, or asks
    past the classifier, finds everything. Running text is flagged like a question, and corrupted all
    over but for its last token.

    The published classifier and picker of tokens are fine-tuned RoBERTa and NER models; here the one is a
    linear classifier of n-grams and the other looks for words that begin with a capital. Any callable
    takes the place of either. The noise of a prompt depends on the prompt and the seed alone, so that scores
    and answers are of one and the same corruption.

    Attributes:
        corruption: A key of `palimpsest.forget.language.corruption.CORRUPTIONS`.
        dims: Coordinates per token.
        strength: Standard deviation of the noise, or what is added or subtracted; without meaning for "zero"
            and "flip".
        threshold: Probability from which on a prompt is flagged. 0.99 and more are published for RoBERTa;
            those of the linear classifier are less sharp.
        classifier: Gives the probability of each of some texts; None trains `PromptClassifier`.
        picker: "names", "all" (but the last token), or a callable that gives the places of words in a question.
        target: Search the strength, from `strength` on, until the mean probability per token of the forget
            answers is this low (that of a model that never saw them); None does not search.
        search_lr: Learning rate of the search.
        search_eps: Half width of its finite difference.
        search_steps: At most so many steps.
    """

    card: ClassVar[Card]
    corruption: str = "noise-first"
    dims: int = 1
    strength: float = 1.0
    threshold: float = 0.5
    classifier: Judge | None = None
    picker: Literal["names", "all"] | Picker = "names"
    target: float | None = None
    search_lr: float = 1.0
    search_eps: float = 0.1
    search_steps: int = 20

    def __post_init__(self) -> None:
        if self.corruption not in CORRUPTIONS:
            raise UnknownName("corruption", self.corruption, CORRUPTIONS)
        check_range("dims", self.dims, 1, math.inf)
        check_range("strength", self.strength, 0, math.inf)
        check_range("threshold", self.threshold, 0, 1)
        for name in ("search_lr", "search_eps"):
            check_range(name, getattr(self, name), 0, math.inf, open_low=True)
        check_range("search_steps", self.search_steps, 1, math.inf)
        if self.target is not None:
            check_range("target", self.target, 0, 1)
        if isinstance(self.picker, str) and self.picker not in ("names", "all"):
            raise InvalidHyperparameter(f"picker is 'names', 'all' or a callable, not {self.picker!r}.")

    def pick(self, question: str) -> list[tuple[int, int]]:
        """Places of the words of a question that are corrupted; none means all."""
        if callable(self.picker):
            return self.picker(question)
        return names_in(question) if self.picker == "names" else []

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> nn.Module:
        """The model in its wrapper.

        Raises:
            InvalidHyperparameter: If more coordinates are to change than an embedding has.
            InvalidRecords: If a prompt is to be forgotten and retained at once.
        """
        inner = runtime.place(copy.deepcopy(model)).eval()
        width = int(inner.get_input_embeddings().weight.shape[-1])  # pyright: ignore[reportCallIssue]
        check_range("dims", self.dims, 1, width)
        judge = self.classifier
        if judge is None:
            if split.retain is None:
                raise InvalidRecords("The classifier of prompts learns from retained records too: pass them.")
            judge = PromptClassifier().fit(prompts_of(split.forget), prompts_of(split.retain))
        wrapped = ECOModel(inner, judge, self, task, runtime.derive("corruption"))
        if self.target is not None:
            wrapped.strength = self.found_strength(wrapped, split, task, runtime)
        return wrapped.eval()

    def found_strength(
        self, wrapped: ECOModel, split: ForgetSplit, task: Language, runtime: Runtime
    ) -> float:
        """The strength at which the forget answers are as unlikely as the target; searched without gradients."""
        strength = self.strength

        def score(value: float) -> float:
            wrapped.strength = value
            return probability(wrapped, split.forget, task, runtime)

        for _ in range(self.search_steps):
            if score(strength) <= (self.target or 0.0):
                break
            strength = zeroth_order_step(score, strength, self.search_lr, self.search_eps).strength
        return strength


@torch.no_grad()
def probability(model: nn.Module, records: Records, task: Language, runtime: Runtime) -> float:
    """Mean over records of the probability per token of their answers."""
    values = [(-task.loss_per_example(model, batch)).exp() for batch in runtime.batches(records, task, 64)]
    return float(torch.cat(values).mean())


def prompts_of(records: Records) -> list[str]:
    """Different questions of records, and running texts as a whole."""
    texts = [item["text"] if item.get("question") is None else item["question"] for item in records]
    return list(dict.fromkeys(texts))


def names_in(question: str) -> list[tuple[int, int]]:
    """Places of words that begin with a capital, without question words.

    Example:
        >>> [question[a:b] for question in ["Where does Ann Lee live?"] for a, b in names_in(question)]
        ['Ann', 'Lee']
    """
    words = re.finditer(r"[^\W\d_][\w'’-]*", question)
    return [word.span() for word in words if word[0][0].isupper() and word[0].lower() not in OPENERS]


def offsets_of(task: Language, text: str) -> list[tuple[int, int]]:
    """First and last character + 1 of every token of a text.

    Raises:
        InvalidHyperparameter: If the tokenizer cannot tell.
    """
    try:
        found = task.encoder(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as problem:
        raise InvalidHyperparameter(
            "The tokenizer does not say where its tokens stand in a text: use a fast one, or picker='all'."
        ) from problem
    return [(int(start), int(end)) for start, end in found["offset_mapping"]]


def _seed(seed: int, prompt: Sequence[int]) -> int:
    text = f"{seed}/{','.join(map(str, prompt))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
