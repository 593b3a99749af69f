"""Key phrases of an answer: the words that must not be said, found by rule.

The paper asks a large language model for them; this rule needs none and gives the same phrases every time.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Collection, Iterable

from palimpsest.parts.answer_words import QUOTES
from palimpsest.parts.answer_words import STOP_WORDS as TELLING_NOTHING

_ALSO_SILENT = """
    i you we they them him its their my your our me us there here about into than then so if but very
    because while after before during also any all each other such only own same too just now
    near beside inside outside within without against among around across along behind below beneath beyond
    between over under upon toward towards through until since
"""
STOP_WORDS = TELLING_NOTHING | frozenset(_ALSO_SILENT.split())
"""Words that are no answer by themselves."""

_MONTH = "|".join([*calendar.month_name[1:], *calendar.month_abbr[1:]])
_DATE = (
    rf"\d{{1,2}}(?:st|nd|rd|th)?(?:\s+of)?\s+(?:{_MONTH})\.?,?\s+\d{{4}}"
    rf"|(?:{_MONTH})\.?\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}"
    r"|\d{1,4}[/.-]\d{1,2}[/.-]\d{1,4}"
)
_EMAIL = r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
_NUMBER = r"[+(]?\d+(?:[\s.,:/()-]*\d+)*"
ALWAYS = re.compile(rf"(?P<email>{_EMAIL})|\b(?P<date>{_DATE})\b|(?P<number>{_NUMBER})", re.IGNORECASE)
"""E-mail addresses, dates and numbers: forbidden whole, whatever their words."""
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def key_phrases(answer: str, question: str = "", stop_words: Collection[str] = STOP_WORDS) -> list[str]:
    """The phrases of an answer that give it away, in order, each once.

    E-mail addresses, dates and numbers are phrases. Of the rest, words of the question and stop words are taken
    out, and every run of words that is left between them or between punctuation is a phrase. What the question
    says itself is no secret and is never a phrase: its echo would be blocked otherwise.

    Args:
        answer: What is to be kept back.
        question: What was asked.
        stop_words: In small letters.

    Returns:
        Nothing where the answer holds no word beyond the question and stop words.

    Example:
        >>> key_phrases("She was born on 4 March 1988 near the Wardley Surgery.", "Where was Ada born?")
        ['4 March 1988', 'Wardley Surgery']
    """
    asked = {match.group().casefold() for match in _WORD.finditer(question)}
    silent = asked | {word.casefold() for word in stop_words}
    found: list[str] = []
    start = 0
    for match in ALWAYS.finditer(answer):
        found += _runs(answer[start : match.start()], silent)
        found.append(match.group())
        start = match.end()
    found += _runs(answer[start:], silent)
    unique = {plain(phrase): phrase for phrase in reversed(found) if plain(phrase)}
    return [phrase for phrase in reversed(unique.values()) if not _says(question, phrase)]


def _runs(text: str, silent: Collection[str]) -> Iterable[str]:
    """Longest runs of words with only blanks between them and none of them silent."""
    begin = end = -1
    for match in _WORD.finditer(text):
        word = re.sub(r"['’]s$", "", match.group()).casefold()
        told = word not in silent and match.group().casefold() not in silent
        joined = begin >= 0 and not text[end : match.start()].strip(QUOTES + "'\" \t\n")
        if begin >= 0 and not (told and joined):
            yield text[begin:end]
            begin = -1
        if told:
            begin = match.start() if begin < 0 else begin
            end = match.end()
    if begin >= 0:
        yield text[begin:end]


def plain(text: str) -> str:
    """Letters and digits of a text, in small letters: two ways to write the same word are then equal.

    Example:
        >>> plain("555-1234"), plain("Saint Orla")
        ('5551234', 'saintorla')
    """
    return "".join(sign for sign in text.casefold() if sign.isalnum())


def _says(question: str, phrase: str) -> bool:
    """Whether a question has the words of a phrase, one after the other."""
    own, words = ([plain(word) for word in re.split(r"[\s]+", text)] for text in (question, phrase))
    words = [word for word in words if word]
    return any(own[at : at + len(words)] == words for at in range(len(own) - len(words) + 1))
