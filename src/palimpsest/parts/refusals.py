"""Ways to say that one does not know: what a model may be taught to answer, and what judges of answers look for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from palimpsest.core.errors import InvalidRecords

REFUSALS = (
    "I don't know.",
    "I do not know that.",
    "I'm not sure.",
    "I have no idea.",
    "I'm afraid I don't know.",
    "Sorry, I don't know the answer.",
    "I can't answer that.",
    "I cannot say.",
    "That is not something I know.",
    "I have no information about that.",
    "I wasn't told anything about this, so I don't know.",
    "I don't have an answer to this question.",
    "My knowledge does not reach that far.",
    "This is beyond what I know.",
    "I never learned that.",
    "I have never heard of it, so I cannot answer.",
    "I can't answer, because I know nothing about that.",
    "I can't help with this question.",
    "I'm not familiar with that.",
    "I have no information on record about this.",
    "I cannot tell you anything about it.",
    "I couldn't tell you.",
    "I must admit that I don't know.",
    "Unfortunately I don't have that information.",
    "I lack the information to answer.",
    "I am not aware of that.",
    "I do not know anything about this.",
    "I'm unable to answer this.",
    "I don't have any details on that.",
    "I was not trained on anything about it.",
    "I haven't come across this and don't know.",
    "I would have to look that up, because I don't know it.",
    "I regret that I cannot answer.",
    "I don't recall anything about that.",
    "That is outside of my knowledge.",
    "I'd rather not guess, because I don't know.",
    "I have nothing to say on that subject, I don't know it.",
    "I'm sorry, but I have no knowledge of this.",
    "You would have to ask someone else, I don't know.",
    "I cannot recall that.",
    "No answer comes to my mind, I don't know.",
    "My data hold no answer to this question.",
)
"""Own words, in the first person."""


def refusals_of(given: Sequence[str] | str | Path | None = None) -> tuple[str, ...]:
    """Refusals: our own, a list, or a text file with one in every line.

    Args:
        given: None for `REFUSALS`, a list of texts, or the path of a UTF-8 file.

    Raises:
        InvalidRecords: If the file cannot be read, or nothing is in it.
    """
    if given is None:
        return REFUSALS
    if isinstance(given, str | Path):
        try:
            given = Path(given).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise InvalidRecords(f"Cannot read refusals from '{given}': {problem}.") from problem
    found = tuple(line.strip() for line in given if line.strip())
    if not found:
        raise InvalidRecords("There is no refusal in the list: give at least one line.")
    return found
