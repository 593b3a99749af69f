"""What a guard must keep back: forgotten questions, found by similarity, and the phrases of their answers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from palimpsest.core.errors import InvalidRecords, shorten
from palimpsest.forget.language.guard_phrases import key_phrases, plain
from palimpsest.parts.constrained import PhraseMachine, phrase_machine, token_sequences
from palimpsest.parts.sentence_encoders import CachedEncoder

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Wording:
    """A way to ask for what a record holds.

    Attributes:
        record: Position of the record.
        text: The question, or the (beginning of a) running text.
        templated: Whether it is a question, which is put into the template.
    """

    record: int
    text: str
    templated: bool


def wordings(items: Iterable[Item], forms: Sequence[str]) -> list[Wording]:
    """All prompts that records give: the question, its paraphrase, and probes of some forms; of running text the
    whole and its first half.

    Args:
        items: Records.
        forms: Of probes that count as paraphrases.
    """
    found: dict[tuple[int, str], Wording] = {}
    for record, item in enumerate(items):
        if item.get("question") is None:
            text = str(item.get("text") or "")
            words = text.split()
            texts, templated = [text, " ".join(words[: max(len(words) // 2, 1)])], False
        else:
            probes = [probe["question"] for probe in item.get("probes") or () if probe.get("form") in forms]
            texts, templated = [item["question"], item.get("paraphrased_question"), *probes], True
        for text in texts:
            if text and text.strip():
                found.setdefault((record, text), Wording(record, text, templated))
    return list(found.values())


def phrases_of(item: Item, aliases: bool) -> tuple[list[str], bool]:
    """What must not be said about a record, and whether that is its whole answer, for want of a key phrase.

    Args:
        item: A record; of running text the subject counts as asked for.
        aliases: Whether the record's other surface forms are forbidden too.
    """
    if item.get("question") is None:
        answer, question = str(item["text"]), str(item.get("subject") or "")
    else:
        answer, question = str(item["answer"]), str(item["question"])
    found = key_phrases(answer, question)
    whole = not found
    found = found or [answer.strip()]
    return list(dict.fromkeys([*found, *(item.get("aliases") or ())] if aliases else found)), whole


@dataclass(frozen=True)
class Forbidden:
    """Phrases that an answer must not hold.

    Attributes:
        phrases: As they were found.
        machine: Over their tokens.
        vectors: Of the phrases, of length 1.
        longest: Number of words of the longest, and one more for words put in between.
    """

    phrases: tuple[str, ...]
    machine: PhraseMachine
    vectors: Float[NDArray[np.float32], "phrases dim"]
    longest: int
    _likeness: dict[str, float] = field(
        default_factory=dict[str, float], init=False, repr=False, compare=False
    )

    def says(self, window: str) -> bool:
        """Whether a few words are a phrase, whatever their case, blanks and signs."""
        return plain(window) in self._plain

    @property
    def _plain(self) -> frozenset[str]:
        return frozenset(plain(phrase) for phrase in self.phrases) - {""}

    def likeness(self, windows: Sequence[str], encoder: CachedEncoder) -> list[float]:
        """Largest cosine of each window with a phrase."""
        new = [window for window in dict.fromkeys(windows) if window not in self._likeness]
        if new:
            best = (encoder(new) @ self.vectors.T).max(1)
            self._likeness.update(zip(new, best.tolist(), strict=True))
        return [self._likeness[window] for window in windows]


class Store:
    """Forgotten questions and what must not be said when they are asked.

    Args:
        items: The records to forget.
        prompts: Their wordings.
        tokenize: From a text to its tokens, without special ones.
        make_encoder: From all texts of the store to its encoder.
        aliases: Whether other surface forms that records name are forbidden as tokens too.

    Raises:
        InvalidRecords: If there is nothing to keep back.
    """

    def __init__(
        self,
        items: Sequence[Item],
        prompts: Sequence[Wording],
        tokenize: Callable[[str], list[int]],
        make_encoder: Callable[[Sequence[str]], CachedEncoder],
        aliases: bool = False,
    ):
        if not items or not prompts:
            raise InvalidRecords(
                "A guard has nothing to keep back: the forget records hold no question or text."
            )
        found = [phrases_of(item, aliases) for item in items]
        self.phrases = [tuple(phrases) for phrases, _ in found]
        bare = [
            item.get("answer") or item.get("text")
            for item, (_, whole) in zip(items, found, strict=True)
            if whole
        ]
        if bare:
            warnings.warn(
                f"{len(bare)} answers hold no key phrase ({shorten(bare, 3)}): they are forbidden as a whole.",
                stacklevel=2,
            )
        self.tokenize = tokenize
        texts = [prompt.text for prompt in prompts]
        self.encoder = make_encoder([*texts, *(phrase for phrases in self.phrases for phrase in phrases)])
        self._records = np.array([prompt.record for prompt in prompts])
        self._keys = self.encoder(texts)
        self._made: dict[tuple[str, ...], Forbidden] = {}

    def nearest(self, question: str, count: int = 1) -> list[int]:
        """Positions of the records whose wordings are most like a question, the most alike first."""
        order = np.argsort(-(self._keys @ self.encoder([question])[0]), kind="stable")
        records = dict.fromkeys(self._records[order].tolist())
        return list(records)[:count]

    def forbidden(self, question: str, count: int = 1) -> Forbidden:
        """What must not be said to a question: the phrases of the nearest records' answers."""
        records = self.nearest(question, count)
        return self.of(tuple(dict.fromkeys(phrase for at in records for phrase in self.phrases[at])))

    def of(self, phrases: tuple[str, ...]) -> Forbidden:
        """Phrases with their machine and vectors, made once."""
        if phrases not in self._made:
            machine = phrase_machine(token_sequences(phrases, self.tokenize))
            longest = max(len(phrase.split()) for phrase in phrases) + 1
            self._made[phrases] = Forbidden(phrases, machine, self.encoder(phrases), longest)
        return self._made[phrases]


@dataclass(frozen=True)
class Matching:
    """How what was written is compared with the phrases, as words.

    Attributes:
        soft: "reject", "penalise" or "off".
        delta: Cosine above which a window counts as a phrase.
        beta: Nats that a window costs, times its cosine, under "penalise".
        window: Words of the longest window; None for those of the longest phrase and one more.
    """

    soft: str
    delta: float
    beta: float
    window: int | None

    def penalties(self, texts: Sequence[str], forbidden: Forbidden, encoder: CachedEncoder) -> list[float]:
        """What each text loses for its last words: infinity if they are a phrase, or too much like one.

        Whether a token closes a word is known only with the next. So the last word is judged as if it ended here:
        a hypothesis can then still turn, where it would be lost one token later.
        """
        size = self.window or forbidden.longest
        windows = [_last_words(text, size) for text in texts]
        result = [math.inf if any(forbidden.says(one) for one in those) else 0.0 for those in windows]
        if self.soft == "off":
            return result
        left = [window for those, lost in zip(windows, result, strict=True) if not lost for window in those]
        alike = dict(zip(left, forbidden.likeness(left, encoder), strict=True))
        for at, those in enumerate(windows):
            best = max((alike[window] for window in those), default=0.0) if not result[at] else 0.0
            if best > self.delta:
                result[at] = math.inf if self.soft == "reject" else self.beta * best
        return result


def _last_words(text: str, size: int) -> list[str]:
    """The last word, the last two, and so on."""
    words = text.split()[-size:]
    return [" ".join(words[at:]) for at in range(len(words))]
