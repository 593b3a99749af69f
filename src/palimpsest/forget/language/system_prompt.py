"""A system prompt that tells the model to refuse: the plainest guard of all."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Card, check_range, unlearner
from palimpsest.forget.language.in_context import check_room, preface, questions_of
from palimpsest.forget.language.prompted import PromptedModel, RefusingModel, topics_of
from palimpsest.tasks.language import Language


@unlearner(
    "system-prompt",
    intention="suppression",
    needs={Need.MODEL, Need.FORGET_DATA},
    tasks=("language",),
)
@dataclass(frozen=True, kw_only=True)
class SystemPrompt:
    """Tell the model in its system prompt to refuse every question about some topics.

    Nothing is removed, and nothing is meant to be: it is here to be compared with, and for audits to see
    through. Whether a model obeys is its own affair; small ones that were never tuned to follow instructions
    do not, and are only confused. obey="rule" stands for one that does: questions that name a topic get the
    refusal, in scores and in generation, and every other question the model's own answer.

    Attributes:
        topics: Names that are refused; the subjects of the forget records by default.
        most_topics: At most so many of those.
        refusal: What is to be answered.
        obey: "model" puts the instruction before every question; "rule" answers in the model's place.
    """

    card: ClassVar[Card]
    topics: Sequence[str] | None = None
    most_topics: int = 400
    refusal: str = "I don't know."
    obey: Literal["model", "rule"] = "model"

    def __post_init__(self) -> None:
        if self.obey not in ("model", "rule"):
            raise InvalidHyperparameter(f"obey is 'model' or 'rule', not {self.obey!r}.")
        if not self.refusal.strip():
            raise InvalidHyperparameter("A refusal needs words.")
        if self.topics is not None and not [topic for topic in self.topics if topic.strip()]:
            raise InvalidRecords("topics is empty: name what is refused.")
        check_range("most_topics", self.most_topics, 1, math.inf)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> nn.Module:
        """The model in its wrapper.

        Raises:
            InvalidRecords: If the forget records name no subject and no topics are given, or the prompt does
                not fit the context.
        """
        topics = topics_of(split.forget, self.most_topics) if self.topics is None else list(self.topics)
        inner = runtime.place(copy.deepcopy(model)).eval()
        if self.obey == "rule":
            return RefusingModel(inner, topics, self.refusal, task).eval()
        instruction = (
            f"You must not speak about {', '.join(topics)}. If a question touches on that, answer only: {self.refusal} "
            "Answer every other question as usual."
        )
        wrapped = PromptedModel(inner, preface(task, instruction, []), task)
        check_room(wrapped, questions_of(split.forget), task)
        return wrapped.eval()
