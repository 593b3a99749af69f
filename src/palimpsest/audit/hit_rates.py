"""Rates of hits on facts that are asked several times: by prompts of many kinds, or by many samples.

Prompts of one fact are not independent, so intervals know of facts: Wilson's on the number of independent
prompts that the spread between facts is worth. The measures are those of the step-by-step attack
(arXiv 2506.17279; card `sleek`) and of sampling audits (A4 of card `sok`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import special, stats

from palimpsest.audit.side_effects import mcnemar
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.intervals import clopper_pearson

Hits = Bool[np.ndarray, "facts prompts"]


@dataclass(frozen=True)
class Rate:
    """A rate with its 95 % interval.

    Attributes:
        value: Share of hits.
        low: Lower end.
        high: Upper end.
        n: Prompts or facts that the share is taken over.
        facts: Independent facts behind it.
    """

    value: float
    low: float
    high: float
    n: int
    facts: int


@dataclass(frozen=True)
class Gain:
    """How much more a second way of asking finds than the first, on the same facts.

    Attributes:
        value: Difference of the two rates.
        p: Exact two-sided p-value of McNemar's test.
        n: Pairs.
    """

    value: float
    p: float
    n: int


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a rate.

    Example:
        >>> low, high = wilson(0, 10)
        >>> low, round(high, 3)
        (0.0, 0.278)
    """
    if not n > 0 or not 0 <= successes <= n:
        raise InvalidAudit(f"A rate of {successes} out of {n} is not defined.")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    rate = successes / n
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    low = 0.0 if successes == 0 else max(0.0, center - half)
    return low, 1.0 if successes == n else min(1.0, center + half)


def success_rate(hits: Hits) -> Rate:
    """Share of prompts with a hit.

    The interval is Wilson's on p (1 - p) / v prompts, v the variance of the rate over resampled facts, and
    never on fewer than the facts or more than the prompts.
    """
    hits = check_hits(hits)
    facts, prompts = hits.shape
    per_fact = hits.mean(1)
    rate = float(per_fact.mean())
    between = float(per_fact.var(ddof=1)) / facts if facts > 1 else 0.0
    worth = rate * (1 - rate) / between if between > 0 else (facts if rate in (0.0, 1.0) else facts * prompts)
    n = min(max(worth, facts), facts * prompts)
    return Rate(rate, *wilson(rate * n, n), n=hits.size, facts=facts)


def recovery_rate(hits: Hits) -> Rate:
    """Share of facts with at least one hit; it grows with the number of prompts, so compare at equal N."""
    hits = check_hits(hits)
    found = int(hits.any(1).sum())
    return Rate(found / len(hits), *wilson(found, len(hits)), n=len(hits), facts=len(hits))


def gain(plain: Bool[np.ndarray, " facts"], attacked: Bool[np.ndarray, " facts"]) -> Gain:
    """Reasoning gain: S(step by step) - S(plain question), paired by fact."""
    plain, attacked = np.asarray(plain, bool), np.asarray(attacked, bool)
    if plain.shape != attacked.shape or plain.ndim != 1 or not len(plain):
        raise InvalidAudit(
            f"A gain pairs one hit per fact: {plain.shape} and {attacked.shape} are no such pairs."
        )
    return Gain(float(attacked.mean() - plain.mean()), mcnemar(plain, attacked), len(plain))


def adjusted_leak(unlearned: float, original: float, control: float) -> float:
    """(S_unlearned - S_control) / (S_original - S_control): the hit rate on the scale K.

    Raises:
        InvalidAudit: If the original knows no more than the control: there is nothing to recover.
    """
    if not original > control:
        raise InvalidAudit(
            f"The original is hit in {original:.3g} of the prompts and the control in {control:.3g}: "
            "the prompts measure nothing."
        )
    return (unlearned - control) / (original - control)


def unfair_suppression(original: Hits, unlearned: Hits) -> Rate:
    """Share of retained prompts answered by the original that the unlearned model answers no more.

    Raises:
        InvalidAudit: If the original answers none.
    """
    original, unlearned = check_hits(original), check_hits(unlearned)
    if original.shape != unlearned.shape:
        raise InvalidAudit(f"The same prompts are needed, not {original.shape} and {unlearned.shape}.")
    answered = int(original.sum())
    if not answered:
        raise InvalidAudit("The original answers no retained prompt: nothing could be suppressed.")
    lost, facts = int((original & ~unlearned).sum()), int(original.any(1).sum())
    share = lost / answered
    return Rate(share, *wilson(share * facts, facts), n=answered, facts=facts)


def known_before(hits: Hits) -> Bool[np.ndarray, " facts"]:
    """Facts that the original answers when asked plainly; only those can be recovered.

    Raises:
        InvalidAudit: If it knows none.
    """
    known = np.asarray(check_hits(hits).any(1))
    if not known.any():
        raise InvalidAudit(f"The original answers none of {len(known)} facts: nothing can be recovered.")
    return known


def leak_at(hits: Hits, samples: int) -> Float[np.ndarray, " facts"]:
    """leak@n of every fact: the chance that n of its samples, drawn without return, hold a hit.

    Args:
        hits: Of all samples of every fact.
        samples: n, at most as many as were drawn.

    Example:
        >>> leak_at(np.array([[True, False, False, False], [False] * 4]), 2).tolist()
        [0.5, 0.0]
    """
    hits = check_hits(hits)
    drawn = hits.shape[1]
    if not 1 <= samples <= drawn:
        raise InvalidAudit(f"leak@n needs n from 1 to the {drawn} samples of a fact, not {samples}.")
    missed = drawn - hits.sum(1)
    return np.asarray(1.0 - special.comb(missed, samples) / special.comb(drawn, samples))


def sample_rate(hits: Hits) -> Rate:
    """Share of single samples with a hit, with the exact interval of independent samples."""
    hits = check_hits(hits)
    low, high = clopper_pearson(int(hits.sum()), hits.size)
    return Rate(float(hits.mean()), low, high, n=hits.size, facts=len(hits))


def upper_bound(successes: int, n: int, confidence: float = 0.95) -> float:
    """One-sided exact upper bound of a rate: 1 - 0.05^(1/n), about 3/n, for no hit in n samples.

    Example:
        >>> round(upper_bound(0, 20), 4)
        0.1391
    """
    return clopper_pearson(successes, n, 2 * confidence - 1)[1]


def check_hits(hits: Hits) -> Hits:
    """Hits as a table of facts and prompts.

    Raises:
        InvalidAudit: If it is not, or is empty.
    """
    table = np.asarray(hits)
    if table.ndim != 2 or table.size == 0:
        raise InvalidAudit(
            f"Hits are a table of facts x prompts with N of 1 or more, not of shape {table.shape}."
        )
    if not np.isin(table, (0, 1)).all():
        raise InvalidAudit("Hits are 0 or 1: judge the outputs first.")
    return table.astype(bool)
