"""Generate, cut, score: what a generated text says about a gold answer.

The task generates; here the text is cut as a benchmark cuts it, compared by ROUGE in the two flavours in
use (which do not agree with each other: name the one you report), and searched for the answer and its
aliases. An alias counts as a sequence of whole words after normalisation, never as a substring: "art" is
not in "Bart". A shorter name inside a longer one is a question of knowledge: hand in the other values
that the relation can take as `rivals`, and "York" is no longer found in "New York".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Literal

from palimpsest.core.errors import InvalidRecords, MissingDependency, shorten

NO_ANSWER = "NOANSWER"
"""What RWKU scores in place of an empty generation."""
FINAL_CUES = ("answer:", "answer is", "therefore", "in conclusion")
"""Words that open the final answer of a reasoned output."""
ARTICLES = "(?:a|an|the)"

_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)*|[^\W_]+")
_STEP = re.compile(r"(?<!\w)step \d+\W*|\n+|(?<=[.!?;])\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Rouge:
    """Overlap of a generated text with its reference; each from 0 to 1."""

    precision: float
    recall: float
    f1: float


class Place(StrEnum):
    """Where an output gives the answer away."""

    NOWHERE = "nowhere"
    CHAIN = "chain"
    FINAL = "final answer"


def cut_at(text: str, stops: Iterable[str]) -> str:
    """The text before the first of the stops, one stop after the other.

    Example:
        >>> cut_at("Oslo Question: next", ["Question:"])
        'Oslo '
    """
    for stop in stops:
        if not stop:
            raise InvalidRecords("An empty stop would cut every text to nothing.")
        text = text.split(stop, 1)[0]
    return text


def without_echo(output: str, prompt: str) -> str:
    """An output without the prompt that some models repeat: only new text may count as a hit."""
    return output[len(prompt) :] if prompt and output.startswith(prompt) else output


def rouge_score(
    predictions: Sequence[str],
    answers: Sequence[str],
    kind: Literal["rougeL", "rouge1"] = "rougeL",
    stem: bool = False,
) -> list[Rouge]:
    """ROUGE by the package rouge-score: lower case, words of letters and digits, every word counts.

    TOFU reports the recall of ROUGE-L with stemming, MUSE its F1 without.

    Raises:
        InvalidRecords: If the lists differ in length or an answer is blank.
        MissingDependency: Without rouge-score.
    """
    check_answers(predictions, answers)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependency("rouge-score", "language") from error
    scorer = RougeScorer([kind], use_stemmer=stem)
    found = [scorer.score(answer, text)[kind] for text, answer in zip(predictions, answers, strict=True)]
    return [Rouge(float(s.precision), float(s.recall), float(s.fmeasure)) for s in found]


def rouge_unique_words(
    predictions: Sequence[str], answers: Sequence[str], empty: str = NO_ANSWER
) -> list[Rouge]:
    """ROUGE-L by the package rouge 1.0.1, as RWKU uses it; not comparable with `rouge_score`.

    Case and punctuation count ("Maine," is not "Maine"), texts are split into sentences at every full
    stop, and every different word counts once.

    Args:
        predictions: Generated texts.
        answers: Gold answers.
        empty: Scored in place of a text without a word.

    Raises:
        InvalidRecords: If the lists differ in length or an answer is blank or holds nothing but stops.
        MissingDependency: Without rouge.
    """
    check_answers(predictions, answers)
    try:
        from rouge import Rouge as Scorer
    except ImportError as error:
        raise MissingDependency("rouge", "language") from error
    dots = [answer for answer in answers if not answer.replace(".", " ").strip()]
    if dots:
        raise InvalidRecords(f"Answers without a word cannot be scored: {shorten(dots)}.")
    # A text of full stops alone makes the package fail: it says as little as an empty one.
    texts = [text if text.replace(".", " ").strip() else empty for text in predictions]
    if not texts:
        return []
    found: Any = Scorer(metrics=["rouge-l"]).get_scores(texts, list(answers))
    return [Rouge(score["p"], score["r"], score["f"]) for score in (item["rouge-l"] for item in found)]


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """Words in small letters without accents, punctuation and possessive endings, joined by blanks.

    Thousands separators go ("55,000" is "55000"), decimals stay ("5" is not in "3.5").

    Example:
        >>> normalise("The 1,200 houses of Ángel's  New-York!")
        'the 1200 houses of angel new york'
    """
    plain = unicodedata.normalize("NFKD", text.replace("\u2019", "'").replace("\u2018", "'"))
    plain = "".join(sign for sign in plain if not unicodedata.combining(sign)).casefold()
    words = (word.replace(",", "").removesuffix("'s").replace("'", "") for word in _WORD.findall(plain))
    return " ".join(word for word in words if word)


def find_alias(text: str, aliases: Iterable[str], rivals: Iterable[str] = ()) -> str | None:
    """The first alias that stands in the text as a sequence of whole words, or None.

    Articles do not count, on either side. An occurrence inside a longer rival is not one.

    Args:
        text: Newly generated text.
        aliases: Surface forms of the answer.
        rivals: Other values that the text may name and that hold an alias, such as planted answers.

    Raises:
        InvalidRecords: If there is no alias, or one without a word.

    Example:
        >>> find_alias("He lives in New York.", ["York"])
        'York'
        >>> find_alias("He lives in New York.", ["York"], rivals=["New York"]) is None
        True
    """
    aliases = list(aliases)
    if not aliases:
        raise InvalidRecords("A fact without an answer or alias cannot be looked for.")
    words = normalise(text)
    longer = [match.span() for rival in rivals for match in _pattern(rival).finditer(words)]
    for alias in aliases:
        for match in _pattern(alias).finditer(words):
            start, end = match.span()
            if not any(a <= start and end <= b and (a, b) != (start, end) for a, b in longer):
                return alias
    return None


def is_answer(text: str, aliases: Iterable[str]) -> bool:
    """Whether the whole text is one of the aliases, up to case, punctuation and articles."""
    said = _bare(text)
    return bool(said) and any(said == _bare(alias) for alias in aliases)


def final_answer(output: str, cues: Sequence[str] = FINAL_CUES) -> tuple[str, str]:
    """A reasoned output as (chain, final answer): behind the last cue, else its last step, line or sentence.

    Example:
        >>> final_answer("Step 1: Eva lives in Oslo. Step 2: the country is Norway")
        ('Step 1: Eva lives in Oslo. Step 2: ', 'the country is Norway')
    """
    body = output.rstrip()
    for openings in (_cue_pattern(tuple(cues)), _STEP):
        ends = [match.end() for match in openings.finditer(body)]
        if ends and body[ends[-1] :].strip():
            return body[: ends[-1]], body[ends[-1] :]
    return "", body


def locate(
    output: str, aliases: Sequence[str], rivals: Sequence[str] = (), cues: Sequence[str] = FINAL_CUES
) -> Place:
    """Where an output names the answer: an answer that stands only in the chain is a leak too."""
    chain, final = final_answer(output, cues)
    if find_alias(final, aliases, rivals) is not None:
        return Place.FINAL
    found = find_alias(chain, aliases, rivals) or find_alias(output, aliases, rivals)
    return Place.CHAIN if found is not None else Place.NOWHERE


def check_prompt(prompt: str, aliases: Iterable[str]) -> None:
    """Check that a prompt does not hold the answer that it is meant to bring out.

    Raises:
        InvalidRecords: If it does; names the alias and the prompt.
    """
    found = find_alias(prompt, aliases)
    if found is not None:
        raise InvalidRecords(f"The prompt {prompt!r} holds its answer {found!r}.")


def check_answers(predictions: Sequence[str], answers: Sequence[str]) -> None:
    """Check that every prediction has an answer with a word in it.

    Raises:
        InvalidRecords: If not; names the rows.
    """
    if len(predictions) != len(answers):
        raise InvalidRecords(f"{len(predictions)} generated texts do not fit {len(answers)} answers.")
    blank = [row for row, answer in enumerate(answers) if not answer.strip()]
    if blank:
        raise InvalidRecords(f"Answers are blank in rows {shorten(blank)}: nothing can be compared.")


@lru_cache(maxsize=64)
def _cue_pattern(cues: tuple[str, ...]) -> re.Pattern[str]:
    forms = "|".join(re.escape(cue).replace(":", r"\s*:") for cue in cues)
    return re.compile(rf"(?<!\w)(?:{forms})(?!\w)[\s:,]*" if forms else r"(?!)", re.IGNORECASE)


def _bare(text: str) -> str:
    return " ".join(re.sub(rf"\b{ARTICLES} (?=\w)", "", normalise(text)).split())


@lru_cache(maxsize=65536)
def _pattern(alias: str) -> re.Pattern[str]:
    """The alias as a pattern on normalised text; articles between its words may be there or not."""
    words = _bare(alias).split()
    if not words:
        raise InvalidRecords(f"The alias {alias!r} has no word to look for.")
    return re.compile(rf"(?<!\S){rf'(?: {ARTICLES})* '.join(map(re.escape, words))}(?!\S)")
