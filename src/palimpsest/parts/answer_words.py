"""Words of answers: merge tokens to words, rank them by attribution, mask the first of them."""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from palimpsest.core.errors import InvalidRecords

_SILENT = """
    a an the this that these those some most and or not no yes also as at by for from in of on to with
    he she it her his their who what which where when how
    is are was were be been being has have had do does did can could may might shall should will would
    author authors book books work works write writes written known include includes including
"""
STOP_WORDS = frozenset(_SILENT.split())
"""Words that say nothing of whom an answer is about; with those that every answer about an author has."""
WORD_START = "\u2581\u0120"
"""Signs with which tokenisers open a new word."""
QUOTES = "\u201c\u201d\u2018\u2019"


def merge_words(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, float]]:
    """Sub-word tokens as words with the sum of their scores; only a token with a sign opens a new word."""
    words: list[tuple[str, float]] = []
    for token, score in zip(tokens, scores, strict=True):
        piece = token.lstrip(WORD_START)
        if words and not (words[-1][0] and token.startswith(tuple(WORD_START))):
            words[-1] = (words[-1][0] + piece, words[-1][1] + score)
        else:
            words.append((piece, score))
    return [(word.strip(), score) for word, score in words if word.strip()]


def normalize_word(word: str) -> str:
    """A word in small letters, without possessive ending and surrounding punctuation."""
    return word.strip().lower().removesuffix("'s").strip(string.punctuation + QUOTES + " ")


def rank_words(answers: Iterable[Sequence[tuple[str, float]]]) -> list[tuple[str, float]]:
    """Words of several answers by falling sum of their shares of each answer's positive score.

    Every answer has the same weight; one without a positive score has none.
    """
    totals: dict[str, float] = defaultdict(float)
    for words in answers:
        positive = sum(score for _, score in words if score > 0)
        if not positive > 0:
            continue
        for word, score in words:
            if key := normalize_word(word):
                totals[key] += max(score, 0.0) / positive
    return sorted(totals.items(), key=lambda item: item[1], reverse=True)


def mask_answer(
    answer: str,
    ranked: Sequence[str],
    k: int = 5,
    mask: str = "***",
    names: Iterable[str] = (),
    stop_words: Collection[str] = STOP_WORDS,
) -> tuple[str, list[str]]:
    """An answer without the first k ranked words that it holds, and those words.

    Whole words of any case are masked, the longest first. Parts of four letters or more of `names` (of the
    entity) that are left over are masked as well.

    Raises:
        InvalidRecords: If nothing is left to rank, because all words are stop words.
    """
    telling = [word for word in ranked if word.lower() not in stop_words]
    if not telling:
        raise InvalidRecords(f"No word is left to mask: all of {list(ranked)[:5]} are stop words.")
    picked = [word for word in telling if _pattern(word).search(answer)][:k]
    parts = [part for name in names for part in re.findall(r"\w+", name) if len(part) >= 4]
    for word in [*sorted(set(picked), key=len, reverse=True), *sorted(set(parts), key=len, reverse=True)]:
        answer = _pattern(word).sub(lambda _: mask, answer)
    return answer, picked


def _pattern(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z]){re.escape(word)}(?![A-Za-z])", re.IGNORECASE)
