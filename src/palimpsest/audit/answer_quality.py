"""Is it an answer at all? Judges of refusals and of gibberish, and the entropy of n-grams.

A model that refuses or babbles gives no answer away and has not forgotten either: both rates stand beside
every hit rate (a confident wrong answer, a refusal and gibberish are three different outcomes).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from palimpsest.audit.answers import normalise
from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords

Kind = Literal["answer", "refusal", "gibberish", "empty"]

FIRST_PERSON = frozenset(["i", "im", "ive", "id", "ill", "me", "my", "myself"])
_LACKING = """
    not no never cannot cant dont didnt doesnt havent hasnt hadnt wasnt isnt arent couldnt wont wouldnt
    without lack lacking lacks missing yet unable unsure unfamiliar unaware uncertain unknown limited
    decline refuse beyond outside out short loss blank dark depth stumped clueless sorry apologize
    apologise apologies regret afraid disadvantage wish need look research check get
"""
_KNOWING = """
    know knew known knowing knowledge knowledgeable sure certain aware idea clue information info data
    database dataset detail details specifics answer answers respond familiar familiarity learned
    learn learnt recall remember informed insight insights access equipped educated briefed expertise understanding light
    training trained programmed programming scope topic subject question matter area source sources
    resources acquainted encountered capabilities capability reach memory enlightenment faintest
    help assist comment say tell provide back something blank dark loss stumped clueless
"""
LACKING, KNOWING = frozenset(_LACKING.split()), frozenset(_KNOWING.split())
"""A refusal is spoken in the first person, lacks something, and what it lacks is to know."""
OPENING, PERSON_WITHIN = 16, 8
"""Words of a text in which a refusal shows itself, and in which it says "I" or "my"."""
_FIRST_SENTENCE = re.compile(r"[.!?;]\s|\n")


@dataclass(frozen=True)
class Gibberish:
    """When a text is no language; every rule alone is enough.

    Attributes:
        run: As many times the same word in a row.
        words: The rules of distinct and known words need at least so many words.
        distinct: Share of different bigrams below this.
        letters: Share of letters, digits and blanks among the signs below this.
        longest: A word of more letters.
        known: Share of words in `vocabulary` below this.
        vocabulary: Words in small letters; empty leaves that rule out.
    """

    run: int = 4
    words: int = 8
    distinct: float = 0.5
    letters: float = 0.6
    longest: int = 40
    known: float = 0.5
    vocabulary: Collection[str] = ()

    def holds(self, text: str) -> bool:
        """Whether the text is gibberish; an empty one is not."""
        signs = [sign for sign in text if not sign.isspace()]
        if not signs:
            return False
        words = normalise(text).split()
        if not words or max(map(len, words)) > self.longest:
            return True
        if len(signs) >= self.words and sum(map(str.isalnum, signs)) < self.letters * len(signs):
            return True
        if longest_run(words) >= self.run or re.search(r"(\S)\1{5,}", text):
            return True
        if len(words) < self.words:
            return False
        unknown = self.vocabulary and sum(w in self.vocabulary for w in words) < self.known * len(words)
        return bool(unknown) or distinct_share(words, 2) < self.distinct


def is_refusal(text: str, lines: Sequence[str] = ()) -> bool:
    """Whether a text declines to answer: by its first sentence, in the first person.

    What a third person does not know is an answer, and so is "I do not live in Oslo". A refusal that goes
    on to give the answer is still one: look for the answer as well.

    Args:
        text: Generated.
        lines: Published refusals (`read_refusals`); a text that begins with one refuses.

    Example:
        >>> is_refusal("I'm sorry, I do not know that."), is_refusal("He was born in Oslo.")
        (True, False)
    """
    said = normalise(text)
    if any(said == line or said.startswith(f"{line} ") for line in map(normalise, lines) if line):
        return True
    opening = normalise(_FIRST_SENTENCE.split(text.strip(), maxsplit=1)[0]).split()[:OPENING]
    person = FIRST_PERSON.intersection(opening[:PERSON_WITHIN])
    return bool(person) and bool(LACKING.intersection(opening)) and bool(KNOWING.intersection(opening))


def kind_of(text: str, lines: Sequence[str] = (), gibberish: Gibberish | None = None) -> Kind:
    """What a generated text is, before one asks whether it is right."""
    if not text.strip():
        return "empty"
    if is_refusal(text, lines):
        return "refusal"
    return "gibberish" if (gibberish or Gibberish()).holds(text) else "answer"


def read_refusals(path: str | Path) -> list[str]:
    """Refusal lines of a published file: plain lines, although TOFU's is named .jsonl.

    Raises:
        InvalidRecords: If the file has no line or cannot be read.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRecords(f"The refusals {path} cannot be read: {error}.") from error
    lines = [line for line in lines if line]
    if not lines:
        raise InvalidRecords(f"The file of refusals {path} is empty.")
    return lines


def distinct_share(words: Sequence[str], n: int) -> float:
    """Distinct-n: different n-grams over n-grams, 1 if nothing is repeated or the text is too short.

    Example:
        >>> distinct_share("a b a b a".split(), 2)
        0.5
    """
    grams = ngrams(words, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated_share(words: Sequence[str], n: int) -> float:
    """Share of n-grams that stood in the text before."""
    return 1.0 - distinct_share(words, n)


def longest_run(words: Sequence[str]) -> int:
    """How many times in a row the same word stands at most."""
    longest, run = 0, 0
    for index, word in enumerate(words):
        run = run + 1 if index and word == words[index - 1] else 1
        longest = max(longest, run)
    return longest


def ngram_entropy(words: Sequence[str], n: int) -> float:
    """Entropy of the text's n-gram counts, in bits; 0 for a text without n-grams.

    Example:
        >>> ngram_entropy("a b c d e".split(), 2)
        2.0
    """
    counts = Counter(ngrams(words, n)).values()
    total = sum(counts)
    return max(0.0, -sum(count / total * math.log2(count / total) for count in counts))


def fluency(
    words: Sequence[str], ns: Sequence[int] = (2, 3), weights: Sequence[float] = (2 / 3, 4 / 3)
) -> float:
    """Mean of weighted n-gram entropies, RWKU's measure of repetition; it prints 100 times this."""
    if len(ns) != len(weights) or not ns:
        raise InvalidHyperparameter(f"One weight per n is needed: n {list(ns)}, weights {list(weights)}.")
    return sum(weight * ngram_entropy(words, n) for n, weight in zip(ns, weights, strict=True)) / len(ns)


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n words."""
    if n < 1:
        raise InvalidHyperparameter(f"n-grams need n of 1 or more, not {n}.")
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
