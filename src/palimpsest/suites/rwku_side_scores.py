"""Side scores of RWKU: membership signals of fragments, F1 of TriviaQA, fluency (arXiv 2406.10890)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from palimpsest.audit.answer_quality import fluency
from palimpsest.audit.membership import language_signals as signals
from palimpsest.core.errors import InvalidAudit, InvalidRecords, MissingDependency, shorten

FEWEST_TOKENS = 10
"""Of a membership fragment: fewer have no lowest tenth of tokens."""


@dataclass(frozen=True)
class Exposure:
    """Membership signals of fragments about the targets: means of log-likelihoods, no area under a curve.

    Attributes:
        loss: Mean token log-likelihood (a negative number).
        zlib: That over the compressed size.
        min_k: Min-K%++, which the released code files under "mink20".
        printed: -100 times `loss`, as the paper's tables have it: higher means less memorised.
        n: Fragments.
    """

    loss: float
    zlib: float
    min_k: float
    printed: float
    n: int


def exposure(
    scores: signals.TokenScores,
    standardised: signals.TokenScores,
    mask: signals.TokenMask,
    texts: Sequence[str],
    k: float = 0.2,
    fewest: int = FEWEST_TOKENS,
) -> Exposure:
    """Membership signals of a batch of fragments; NaN is an error here, and skipped in the released code.

    Args:
        scores: Log-probabilities of tokens (`language_signals.label_log_probabilities`).
        standardised: `language_signals.standardised_label_scores`; with `smallest_variance` 0 as released.
        mask: Tokens that count.
        texts: The fragments.
        k: Share of tokens of Min-K%++.
        fewest: Tokens that a fragment must have.

    Raises:
        InvalidAudit: If a fragment is too short or a score is NaN.
    """
    short = (mask.sum(1) < fewest).nonzero()[:, 0].tolist()
    if short:
        raise InvalidAudit(f"Fragments {shorten(short)} have fewer than {fewest} scored tokens.")
    loss = float(signals.mean_log_probabilities(scores, mask).mean())
    return Exposure(
        loss,
        float(signals.zlib_scores(scores, mask, texts).mean()),
        float(signals.min_k_scores(standardised, mask, k).mean()),
        -100.0 * loss,
        len(texts),
    )


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """TriviaQA's F1 of words, the best over the references; small letters, no punctuation, no articles.

    Example:
        >>> token_f1("The Beatles", ["beatles", "the fab four"])
        1.0
    """
    if not references:
        raise InvalidRecords("A question without a reference answer cannot be scored.")
    return max(_f1(_words(prediction), _words(reference)) for reference in references)


def mean_fluency(
    texts: Sequence[str], tokenize: Callable[[str], Sequence[str]] | None = None
) -> tuple[float, list[float]]:
    """Mean entropy of n-grams over texts, and that of each; the paper prints 100 times this.

    Args:
        texts: Generated.
        tokenize: Text to words; None takes `treebank_words`.
    """
    if not texts:
        raise InvalidRecords("The fluency of no text is not defined.")
    split = tokenize or treebank_words
    found = [fluency(split(text)) for text in texts]
    return float(np.mean(found)), found


def treebank_words(text: str) -> list[str]:
    """Words and punctuation by nltk's tokenizer, without the model of sentence ends that it downloads.

    So a full stop inside the text stays with its word, where the released code splits it off.

    Raises:
        MissingDependency: Without nltk, which rouge-score brings.
    """
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError as error:
        raise MissingDependency("nltk", "language") from error
    return NLTKWordTokenizer().tokenize(text)


def _words(text: str) -> list[str]:
    plain = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(?:a|an|the)\b", " ", plain).split()


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    if not said or not wanted:
        return float(list(said) == list(wanted))
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))
