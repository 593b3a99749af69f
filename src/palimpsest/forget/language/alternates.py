"""Other answers to the forgotten questions: refusals drawn anew in every epoch, and what the original gave them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.forget.objective import Context
from palimpsest.forget.terms import sequence_table

ALTERNATE = "alternate"
"""Field of an item or batch with the other answer."""
Answered = tuple[str, str]
"""A question and an answer."""


def asked(split: ForgetSplit, method: str) -> Records:
    """The forget records that ask something; running text has no question that could be answered otherwise.

    Raises:
        InvalidRecords: If there is none.
    """
    has = np.array([isinstance(item.get("question"), str) for item in split.forget])
    if not has.any():
        raise InvalidRecords(
            f"{method} teaches other answers to the questions to forget, and no forget record has a question: use a method "
            "for running text (npo, grad-diff, rmu), or add questions."
        )
    return split.forget if has.all() else split.forget.select(has)


def drawn(refusals: Sequence[str], runtime: Runtime, name: str, epoch: int) -> str:
    """The refusal of a record in an epoch; which one depends on the seed, the record and the epoch alone."""
    return refusals[runtime.derive("refusal", name, epoch) % len(refusals)]


def answering(items: Sequence[dict[str, Any]], answers: Sequence[str]) -> list[dict[str, Any]]:
    """The same items with other answers."""
    return [{**item, "answer": answer} for item, answer in zip(items, answers, strict=True)]


def alternate_batch(context: Context, batch: Batch) -> Batch:
    """The batch of a batch's questions with their alternates as answers, on the device."""
    rows = zip(batch["id"], batch["question"], batch[ALTERNATE], strict=True)
    items = [{"id": name, "question": question, "answer": answer} for name, question, answer in rows]
    return context.runtime.to_device(context.task.collate(items))


def alternate_references(
    context: Context, pairs: Sequence[Answered]
) -> Callable[[Batch], Float[Tensor, " batch"]]:
    """Summed losses of alternates under the original, looked up by question and answer.

    Computed once, with the model as it stands at the beginning.
    """
    distinct = list(dict.fromkeys(pairs))
    items = [{"question": question, "answer": answer} for question, answer in distinct]
    table = sequence_table(context.model, Records(items), context.task, context.runtime)
    known = {pair: table[str(number)] for number, pair in enumerate(distinct)}

    def look_up(batch: Batch) -> Tensor:
        values = [known[pair] for pair in zip(batch["question"], batch[ALTERNATE], strict=True)]
        return torch.tensor(values, device=context.runtime.torch_device)

    return look_up
