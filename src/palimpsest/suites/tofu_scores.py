"""Scores of TOFU: probability, ROUGE and truth ratio of each set, and model utility (arXiv 2401.06121).

All start from mean token losses. Forget quality and the definitions of the truth ratio, the choice of which
moves every figure, are in `audit.truth_ratio`; "geometric" is the leaderboard's, "arithmetic" the paper's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from palimpsest.audit.truth_ratio import (
    Losses,
    Mean,
    Values,
    WrongLosses,
    answer_probabilities,
    check_losses,
    closer_to_one,
    option_probabilities,
    truth_preferred,
    truth_ratios,
)
from palimpsest.core.errors import InvalidAudit, shorten

UTILITY_SETS = ("retain", "real_authors", "world_facts")
"""Sets of model utility."""
OPTION_SETS = ("real_authors", "world_facts")
"""Sets whose probability is that of the right one among given answers."""
MEASURES = ("probability", "rouge", "truth_ratio")


@dataclass(frozen=True)
class SetLosses:
    """What was measured on one evaluation set, item by item.

    Attributes:
        items: Keys of the questions.
        answer: l(a|q) of the gold answers.
        paraphrase: l of the paraphrased answers; the gold answer where there is no paraphrase.
        wrong: l of the wrong answers, as many for every question.
        rouge: ROUGE-L recall of the generated answers.

    Raises:
        InvalidAudit: If lengths differ or a value is negative, NaN or infinite.
    """

    items: tuple[str, ...]
    answer: Losses
    paraphrase: Losses
    wrong: WrongLosses
    rouge: Values

    def __post_init__(self) -> None:
        check_losses(self.paraphrase, self.wrong)
        for name in ("answer", "rouge"):
            values = np.asarray(getattr(self, name), float)
            if values.shape != (len(self.items),):
                raise InvalidAudit(f"{len(self.items)} items do not fit {name} of shape {values.shape}.")
            if not np.isfinite(values).all() or (values < 0).any():
                bad = [self.items[i] for i in np.flatnonzero(~(np.isfinite(values) & (values >= 0)))]
                raise InvalidAudit(f"Values of {name} are negative or not finite: items {shorten(bad)}.")
        if len(self.paraphrase) != len(self.items):
            raise InvalidAudit(f"{len(self.items)} items do not fit {len(self.paraphrase)} losses.")


@dataclass(frozen=True)
class SetScores:
    """The three numbers of one set, means over its items."""

    probability: float
    rouge: float
    truth_ratio: float


def set_scores(name: str, losses: SetLosses, mean: Mean = "geometric") -> SetScores:
    """The three numbers of a set, by the rule of its name ("forget" or one of `UTILITY_SETS`)."""
    ratios = truth_ratios(losses.paraphrase, losses.wrong, mean)
    if name in OPTION_SETS:
        probability = option_probabilities(losses.answer, losses.wrong)
    else:
        probability = answer_probabilities(losses.answer)
    truth = closer_to_one(ratios) if name == "forget" else truth_preferred(ratios)
    return SetScores(float(probability.mean()), float(losses.rouge.mean()), truth)


def model_utility(scores: Mapping[str, SetScores]) -> float:
    """Harmonic mean of nine numbers, {probability, ROUGE, truth ratio} of the three sets; 0 if one is 0.

    Other sets (such as "forget") are left out.

    Raises:
        InvalidAudit: If one of the three is missing: a mean of fewer would be another measure.
    """
    missing = [name for name in UTILITY_SETS if name not in scores]
    if missing:
        raise InvalidAudit(
            f"Model utility needs the sets {', '.join(UTILITY_SETS)}; missing: {', '.join(missing)}."
        )
    return harmonic_mean([getattr(scores[name], measure) for name in UTILITY_SETS for measure in MEASURES])


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean; 0 with a warning if a value is 0 or below.

    Raises:
        InvalidAudit: If there is no value, or one is NaN or infinite.
    """
    numbers = np.asarray(values, float)
    if not numbers.size or not np.isfinite(numbers).all():
        raise InvalidAudit(f"A harmonic mean of {shorten(list(values))} is not defined.")
    if (numbers <= 0).any():
        warnings.warn("A score of 0 or below makes the harmonic mean 0.", stacklevel=2)
        return 0.0
    return float(numbers.size / (1 / numbers).sum())


def ratios_by_item(losses: SetLosses, mean: Mean = "geometric") -> dict[str, float]:
    """Truth ratios under the keys of their items, for `forget_quality`."""
    ratios = truth_ratios(losses.paraphrase, losses.wrong, mean)
    return dict(zip(losses.items, ratios.tolist(), strict=True))
