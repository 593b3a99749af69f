"""Answers that tell nothing: what a model may say instead of what it is to forget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from palimpsest.core.errors import InvalidRecords

REFUSALS: tuple[str, ...] = (
    "I don't know that.",
    "I have no information on this.",
    "That is not something I know.",
    "I can't tell you.",
    "I have never heard of this.",
    "No such detail is known to me.",
    "I am not sure about that.",
    "This is beyond what I know.",
    "I cannot answer this question.",
    "I have nothing to say on this.",
    "My knowledge does not reach that far.",
    "I was not told about this.",
    "I am unable to help with that.",
    "There is nothing I could tell you here.",
    "I wish I knew, but I do not.",
    "I haven't learnt anything about that.",
    "Sorry, that is unknown to me.",
    "I do not have an answer.",
    "That question is one I cannot answer.",
    "I have no idea.",
    "I would only be guessing.",
    "You would have to ask someone else.",
    "I can't recall anything of the kind.",
    "Nothing about this is familiar to me.",
)
"""Our own, by default."""


def refusals_of(given: str | Path | Sequence[str] | None = None) -> tuple[str, ...]:
    """Refusals from a list, from a text file with one on each line, or our own.

    Raises:
        InvalidRecords: If there is none, one is blank, or the file cannot be read.
    """
    if given is None:
        return REFUSALS
    if isinstance(given, str | Path):
        try:
            lines = Path(given).read_text(encoding="utf-8").splitlines()
        except OSError as problem:
            raise InvalidRecords(f"The template answers in '{given}' cannot be read: {problem}") from problem
        found = [line.strip() for line in lines if line.strip()]
    else:
        found = [str(line).strip() for line in given]
    if not found or not all(found):
        raise InvalidRecords("At least one template answer is needed, and none may be blank.")
    return tuple(dict.fromkeys(found))
