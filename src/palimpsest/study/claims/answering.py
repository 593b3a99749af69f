"""What the claims of language methods ask models: plain questions, answered greedily."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidRecords, MissingNeed, ModelMismatch
from palimpsest.core.records import Records
from palimpsest.study.claims.measuring import Setting
from palimpsest.tasks.language import Language, plain_questions

NEW_TOKENS = 24


def language(setting: Setting) -> Language:
    """The task of a setting.

    Raises:
        ModelMismatch: If it is not language.
    """
    if not isinstance(setting.task, Language):
        raise ModelMismatch(f"The claim is about language models, not about {setting.task.name}.")
    return setting.task


def retained(setting: Setting) -> Records:
    """The retained records.

    Raises:
        MissingNeed: If they are not at hand.
    """
    if setting.split.retain is None:
        raise MissingNeed("The claim needs the retained records.")
    return setting.split.retain


def plainly_asked(records: Records | None) -> Records:
    """The records that ask for a fact plainly.

    Raises:
        InvalidRecords: If there is none.
    """
    if records is None or len(at := plain_questions(records)) == 0:
        raise InvalidRecords("The claim needs records with plain questions.")
    return records.select(at)


def greedy(setting: Setting, model: nn.Module, records: Records) -> list[str]:
    """The answers of a model to the questions of records."""
    asked = [str(item["question"]) for item in records]
    found = language(setting).generate(model, asked, max_new_tokens=NEW_TOKENS, batch_size=128)
    return [texts[0] for texts in found]


def exact(setting: Setting, model: nn.Module, records: Records) -> float:
    """Share of plain questions that are answered with the very words."""
    asked = plainly_asked(records)
    given = greedy(setting, model, asked)
    return sum(text == item["answer"] for text, item in zip(given, asked, strict=True)) / len(asked)


def answer_losses(
    setting: Setting, model: nn.Module, records: Records, answers: list[list[str]] | None = None
) -> Float[Tensor, " answers"]:
    """Mean token loss of the records' own answers, or of others given for each."""
    asked = plainly_asked(records)
    questions = [str(item["question"]) for item in asked]
    given = answers or [[str(item["answer"])] for item in asked]
    return torch.cat([scores.mean for scores in language(setting).score(model, questions, given)])
