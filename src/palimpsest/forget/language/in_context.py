"""In-context unlearning: a prompt that makes a frozen model answer as if it had not learned something.

Pawelczyk et al. 2024, "In-Context Unlearning", arXiv 2310.07579, for classification; and the form for
questions, which tells the model to behave as if unaware. Weights do not change: whoever reads them, or leaves
the prompt out, finds everything still there.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingNeed
from palimpsest.core.needs import Need
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Card, Paper, check_range, unlearner
from palimpsest.forget.language.prompted import PromptedModel, Rewrite, topics_of
from palimpsest.parts.refusals import refusals_of
from palimpsest.parts.templates import template_of
from palimpsest.tasks.language import Language

Example = tuple[str, str]
"""A text and its label, or a question and its answer."""


def flipped_label_prompt(forget: Sequence[Example], context: Sequence[Example], query: str) -> str:
    r"""Forgotten texts with FLIPPED labels, then correctly labelled others, then the query without label.

    Args:
        forget: Texts to forget, each with a label that is not its own.
        context: Other texts with their labels.
        query: The text that is asked.

    Raises:
        InvalidRecords: If nothing is to be forgotten.

    Example:
        >>> flipped_label_prompt([("dull", "positive")], [("lovely", "positive")], "great cast")
        'dull positive\nlovely positive\ngreat cast'
    """
    if not forget:
        raise InvalidRecords("A prompt for in-context unlearning needs at least one text to forget.")
    return "\n".join([*(f"{text} {label}" for text, label in [*forget, *context]), query])


def unaware_prompt(topics: Sequence[str], question: str, refusals: Sequence[Example] = ()) -> str:
    """An instruction to know nothing of some topics, examples of refusals, and the question.

    Args:
        topics: What the model must act unaware of: names, titles.
        question: The one to be answered.
        refusals: Questions about the topics with refusals as answers.

    Raises:
        InvalidRecords: If no topic is named.
    """
    if not topics:
        raise InvalidRecords("An instruction to be unaware needs at least one topic.")
    instruction = unaware_instruction(topics)
    shown = [f"Question: {asked}\nAnswer: {answer}" for asked, answer in refusals]
    return "\n\n".join([instruction, *shown, f"Question: {question}\nAnswer:"])


def unaware_instruction(topics: Sequence[str]) -> str:
    """The instruction to know nothing of some topics."""
    return (
        f"You have never heard of {', '.join(topics)}. If a question touches on that, say that you do not know; "
        "answer every other question as usual."
    )


@unlearner(
    "in-context",
    intention="suppression",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper("In-Context Unlearning: Language Models as Few Shot Unlearners", "ICML 2024", "2310.07579"),
    search={
        "style": Choice(("unaware", "flipped")),
        "shown": Span(1, 4, integer=True),
        "context": Span(0, 6, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class InContext:
    """Put examples, or an instruction, before every question; the weights stay as they are.

    style="flipped" is in-context unlearning of the paper, carried from labels to answers: forgotten
    questions with wrong answers, then other questions with right ones, then the question that is asked. Of
    the forgotten ones those are shown that share most words with it. style="unaware" tells the model that
    it has never heard of the topics, and shows refusals to questions about them.

    Under a chat template all of it becomes the system turn. What a prompt hides is still in the model.

    Attributes:
        style: "unaware" or "flipped".
        shown: Forgotten questions that are shown with a refusal, or a wrong answer.
        context: Retained questions that are shown with their right answers.
        topics: What to act unaware of; the subjects of the forget records by default.
        most_topics: At most so many of those.
        refusals: For "unaware": None for the library's own, a list of texts, or a file.
    """

    card: ClassVar[Card]
    style: Literal["unaware", "flipped"] = "unaware"
    shown: int = 2
    context: int = 2
    topics: Sequence[str] | None = None
    most_topics: int = 40
    refusals: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        if self.style not in ("unaware", "flipped"):
            raise InvalidHyperparameter(f"style is 'unaware' or 'flipped', not {self.style!r}.")
        check_range("shown", self.shown, 1 if self.style == "flipped" else 0, math.inf)
        check_range("context", self.context, 0, math.inf)
        check_range("most_topics", self.most_topics, 1, math.inf)
        refusals_of(self.refusals)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> nn.Module:
        """The model in its wrapper.

        Raises:
            InvalidRecords: If the longest prompt does not fit the context, or there is nothing to show.
        """
        if split.retain is None:
            raise MissingNeed("The examples of in-context unlearning need retained records.")
        inner = runtime.place(copy.deepcopy(model)).eval()
        forget, kept = questions_of(split.forget), questions_of(split.retain)
        if not forget:
            raise InvalidRecords("No forget record asks a question: there is nothing to show in a prompt.")
        draw = runtime.numpy("in-context examples")
        context = [kept[at] for at in draw.permutation(len(kept))[: self.context]]
        right = [(item["question"], item["answer"]) for item in context]
        if self.style == "unaware":
            topics = topics_of(split.forget, self.most_topics) if self.topics is None else list(self.topics)
            refusals = refusals_of(self.refusals)
            asked = [forget[at]["question"] for at in draw.permutation(len(forget))[: self.shown]]
            refused = [(question, refusals[at % len(refusals)]) for at, question in enumerate(asked)]
            rewrite = preface(task, unaware_instruction(topics), [*refused, *right])
        else:
            wrong = [(item["question"], flipped(item, forget)) for item in forget]
            rewrite = nearest_examples(task, wrong, right, self.shown)
        wrapped = PromptedModel(inner, rewrite, task)
        check_room(wrapped, [*forget, *kept], task)
        return wrapped.eval()


def preface(task: Language, instruction: str, examples: Sequence[Example]) -> Rewrite:
    """Prompts with an instruction and examples before the question, in the template of the task."""
    if task.form.name == "chat":
        turns = [f"Question: {question}\nAnswer: {answer}" for question, answer in examples]
        system = "\n\n".join([*([task.system] if task.system else []), instruction, *turns]).strip()
        form = template_of(task.encoder, "chat", system)
        return lambda question: task.tokens(form.render(question), first=True)
    shown = [task.form.render(question) + task.form.complete(answer) for question, answer in examples]
    before = "\n\n".join([*([instruction] if instruction else []), *shown])
    return lambda question: task.tokens(f"{before}\n\n{task.form.render(question)}", first=True)


def nearest_examples(
    task: Language, wrong: Sequence[Example], right: Sequence[Example], shown: int
) -> Rewrite:
    """Prompts with the wrongly answered examples nearest to the question, then right ones."""
    words = [_words(question) for question, _ in wrong]

    def rewrite(question: str) -> list[int]:
        own = _words(question)
        alike = [len(own & other) / max(len(own | other), 1) for other in words]
        order = sorted(range(len(wrong)), key=lambda at: (-alike[at], at))
        return preface(task, "", [*(wrong[at] for at in order[:shown]), *right])(question)

    return rewrite


def flipped(item: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """A wrong answer: the first `perturbed_answer`, or the answer of the next record that has another one.

    Raises:
        InvalidRecords: If every record has the same answer.
    """
    for text in item.get("perturbed_answer") or ():
        if text != item["answer"]:
            return str(text)
    start = next(at for at, other in enumerate(others) if other is item)
    for other in (*others[start + 1 :], *others[:start]):
        if other["answer"] != item["answer"]:
            return str(other["answer"])
    raise InvalidRecords(
        f"There is no wrong answer for the question {item['question']!r}: add perturbed_answer."
    )


def questions_of(records: Records) -> list[dict[str, Any]]:
    """The records that ask a question."""
    return [item for item in records if isinstance(item.get("question"), str)]


def check_room(wrapped: PromptedModel, items: Sequence[Mapping[str, Any]], task: Language) -> None:
    """Check that prompts with what stands before them, and their answers, fit the context.

    Raises:
        InvalidRecords: Naming the longest.
    """
    limits = [task.max_length, getattr(wrapped.config, "max_position_embeddings", None)]
    limit = min((int(each) for each in limits if each), default=1 << 30)
    for item in items:
        length = len(wrapped.rewritten(task.encode(item["question"], item["answer"])[0]))
        if length > limit:
            raise InvalidRecords(
                f"With what is put before it, record {item['id']!r} has {length} tokens, and the context {limit}: show "
                "fewer examples or topics."
            )


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))
