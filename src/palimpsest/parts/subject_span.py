"""Where a subject lies in a prompt: the tokens that cover its characters."""

from __future__ import annotations

from collections.abc import Sequence

from palimpsest.core.errors import InvalidRecords

Span = tuple[int, int]
"""[begin, end) of tokens or of characters."""


def subject_range(tokens: Sequence[str], subject: str) -> Span:
    """Tokens [begin, end) of a subject, from the text of every token.

    Raises:
        InvalidRecords: If the subject does not occur, with the prompt.

    Example:
        >>> subject_range(["Is", " An", "na", " Li", " old"], "Anna Li")
        (1, 4)
    """
    text, ends = "".join(tokens), []
    for token in tokens:
        ends.append(len(token) + (ends[-1] if ends else 0))
    return token_range(ends, *_characters(text, subject))


def subject_range_in(prompt: str, subject: str, offsets: Sequence[Span]) -> Span:
    """The same, from the character offsets of a fast tokenizer (`return_offsets_mapping`).

    Raises:
        InvalidRecords: If the subject does not occur, or the offsets end before it.
    """
    return token_range([end for _, end in offsets], *_characters(prompt, subject))


def token_range(ends: Sequence[int], start: int, stop: int) -> Span:
    """Tokens that cover characters [start, stop): from the first that ends after start to the first that ends at stop.

    Args:
        ends: Character at which every token ends.
        start: First character.
        stop: One past the last.

    Raises:
        InvalidRecords: If the tokens end before the span does.
    """
    begin = next((i for i, end in enumerate(ends) if end > start), None)
    last = next((i for i, end in enumerate(ends) if end >= stop), None)
    if begin is None or last is None or stop <= start:
        raise InvalidRecords(
            f"No tokens cover characters {start} to {stop}: they end at {max(ends, default=0)}."
        )
    return begin, last + 1


def _characters(text: str, subject: str) -> Span:
    start = text.find(subject) if subject else -1
    if start < 0:
        raise InvalidRecords(f"The subject {subject!r} does not occur in the prompt {text!r}.")
    return start, start + len(subject)
