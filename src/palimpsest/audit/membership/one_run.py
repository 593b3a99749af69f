"""A lower bound on epsilon from guesses about one model (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846)."""

from __future__ import annotations

import math

from scipy import stats

from palimpsest.core.errors import InvalidAudit

BISECTIONS = 30


def one_run_p_value(m: int, r: int, v: int, epsilon: float, delta: float = 0.0) -> float:
    """How likely so many right guesses are if the training was (epsilon, delta)-differentially private.

    Args:
        m: Records whose membership was decided by independent coins.
        r: Guesses made.
        v: Right guesses.
        epsilon: Privacy parameter that is put to the test.
        delta: Its failure probability.

    Returns:
        P(Binomial(r, 1 / (1 + e^-epsilon)) >= v) with the correction for delta (theorem 5.2), at most 1.
    """
    if not 0 <= v <= r <= m or m < 1:
        raise InvalidAudit(f"Guesses must satisfy 0 <= right <= made <= records, got {v}, {r}, {m}.")
    if epsilon < 0 or not 0 <= delta <= 1:
        raise InvalidAudit(f"epsilon must be at least 0 and delta in [0, 1], not {epsilon} and {delta}.")
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(v - 1, r, chance))
    worst = total = 0.0
    for step in range(1, v + 1):
        total += float(stats.binom.pmf(v - step, r, chance))
        worst = max(worst, total / step)
    return min(1.0, tail + worst * delta * 2 * m)


def one_run_epsilon(m: int, r: int, v: int, delta: float = 0.0, p: float = 0.05) -> float:
    """Largest epsilon that the guesses refute at significance p; 0 if none.

    Raises:
        InvalidAudit: If counts contradict each other or p is not in (0, 1).
    """
    if not 0 < p < 1:
        raise InvalidAudit(f"A significance must lie in (0, 1), not {p}.")
    low, high = 0.0, 1.0
    while one_run_p_value(m, r, v, high, delta) < p:
        high += 1
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if one_run_p_value(m, r, v, middle, delta) < p:
            low = middle
        else:
            high = middle
    return low
