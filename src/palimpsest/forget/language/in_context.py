"""In-context unlearning: a prompt that makes a frozen model answer as if it had not learned something.

Pawelczyk et al. 2024, "In-Context Unlearning", arXiv 2310.07579, for classification; and the form for
questions, which tells the model to behave as if unaware. Weights do not change: whoever reads them, or leaves
the prompt out, finds everything still there.
"""

from __future__ import annotations

from collections.abc import Sequence

from palimpsest.core.errors import InvalidRecords

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
    instruction = (
        f"You have never heard of {', '.join(topics)}. If a question touches on that, say that you do not know; "
        "answer every other question as usual."
    )
    shown = [f"Question: {asked}\nAnswer: {answer}" for asked, answer in refusals]
    return "\n\n".join([instruction, *shown, f"Question: {question}\nAnswer:"])
