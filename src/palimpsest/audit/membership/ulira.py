"""U-LiRA: a likelihood-ratio attack on an unlearning method (Hayes et al. 2024, arXiv 2403.01218).

Each shadow run trains on a random half of a pool of records (and always on the retained records), forgets
that half, and never sees the other half. After the run a record of the pool is either forgotten or never
trained; an attacker who knows how confident other runs were in either case must say which. Balanced
accuracy 0.5 is perfect unlearning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from palimpsest.audit.membership.lira import Variance, fit_gaussians, lira_online, log_ratio
from palimpsest.audit.membership.rates import placements, resolvable, tpr_at

Phi = Float[np.ndarray, "runs records"]
Memberships = Bool[np.ndarray, "runs records"]


ALPHA = 0.01


@dataclass(frozen=True)
class Statistic:
    """A statistic as a mean over runs and records.

    Attributes:
        parts: What each record contributes in each run, NaN where it has no part, [runs, records].
    """

    parts: Float[np.ndarray, "runs records"]

    @property
    def value(self) -> float:
        """The mean."""
        return float(np.nanmean(self.parts))

    @property
    def error(self) -> float:
        """Standard error with two-way clusters: runs share a model, records share their own Gaussians.

        Runs alone would look far too certain: a record whose few shadow values happen to differ between
        the two cases does so in every run.
        """
        runs, records = np.nanmean(self.parts, axis=1), np.nanmean(self.parts, axis=0)
        records = records[np.isfinite(records)]
        every = self.parts[np.isfinite(self.parts)]
        variances = [float(np.var(values, ddof=1)) / len(values) for values in (runs, records, every)]
        return math.sqrt(max(variances[0] + variances[1] - variances[2], variances[0], variances[1]))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval, cut to [0, 1]."""
        half = float(stats.norm.ppf(0.975)) * self.error
        return max(0.0, self.value - half), min(1.0, self.value + half)


@dataclass(frozen=True)
class GameResult:
    """How well the attacker did.

    Attributes:
        members: Scores of all records as forgotten ones; they count where `ins`.
        others: As ones that were not; they count where `outs`.
        ins: Which records a run forgot.
        outs: Which records play the other side in a run.
    """

    members: Phi
    others: Phi
    ins: Memberships
    outs: Memberships

    @cached_property
    def accuracy(self) -> Statistic:
        """Balanced accuracy of calling records with a score above 0 forgotten."""
        # The halves weigh the same, so that the mean over all is the balanced accuracy.
        right = np.where(self.ins, (self.members > 0) / (2 * self.ins.mean()), 0.0)
        return Statistic(right + np.where(self.outs, (self.others <= 0) / (2 * self.outs.mean()), 0.0))

    @cached_property
    def auc(self) -> Statistic:
        """Area under the curve within runs."""
        return _auc(self.members, self.others, self.ins, self.outs)

    @property
    def tpr(self) -> Statistic | None:
        """`rate` at 1 %."""
        return self.rate(ALPHA)

    def rate(self, alpha: float) -> Statistic | None:
        """True positive rate within runs at a false positive rate of at most alpha.

        None if a run has fewer than 1/alpha records that were never trained.
        """
        if not resolvable(int(self.outs.sum(1).min()), alpha):
            return None
        hits = np.full(self.members.shape, np.nan)
        for run, (mine, theirs) in enumerate(zip(self.ins, self.outs, strict=True)):
            hits[run, mine] = tpr_at(self.members[run, mine], self.others[run, theirs], alpha).hit
        return Statistic(hits)

    @property
    def margin(self) -> Float[np.ndarray, " records"]:
        """How exposed each record is: its mean score when it was forgotten minus that when it was not."""
        mine = np.where(self.ins, self.members, 0.0).sum(0) / self.ins.sum(0)
        return mine - np.where(self.outs, self.others, 0.0).sum(0) / self.outs.sum(0)


Attack = Callable[[Float[np.ndarray, " records"], Phi, Memberships], Float[np.ndarray, " records"]]
"""From phi of a model, phi of other runs and their memberships to scores (high = forgotten)."""


def play(
    phi: Phi, inside: Memberships, variance: Variance = "pooled", attack: Attack | None = None
) -> GameResult:
    """Attack every run with what is known of the other runs; its complementary run is left out as well.

    Leaving out the pair keeps as many runs with as without each record, so that neither hypothesis is
    favoured by a better estimate.

    Args:
        phi: Logit-scaled confidence of each record under the model of each run.
        inside: Which records a run trained on (and then forgot), in complementary pairs.
        variance: See `lira.fit_gaussians`.
        attack: Instead of the ratio of Gaussians.
    """

    def gaussian(target: np.ndarray, shadows: Phi, known: Memberships) -> np.ndarray:
        return lira_online(target[:, None], shadows[:, :, None], known, variance)

    scores = np.empty_like(phi)
    for run in range(len(phi)):
        rest = np.arange(len(phi)) // 2 != run // 2
        scores[run] = (attack or gaussian)(phi[run], phi[rest], inside[rest])
    return GameResult(scores, scores, inside, ~inside)


def play_against_retrained(
    phi: Phi, retrained: Phi, inside: Memberships, variance: Variance = "pooled"
) -> GameResult:
    """The paper's game: is this the model that forgot the record, or one retrained without it?

    The attacker sees a record of a run's forgotten half, under the run's unlearned or its retrained model.
    Unlike in `play`, whatever else the method changed in the model counts as well.

    Args:
        phi: Under the unlearned model of each run.
        retrained: Under the model of each run that was retrained without the forgotten half.
        inside: Which records a run forgot.
        variance: See `lira.fit_gaussians`.
    """
    scores, others = np.empty_like(phi), np.empty_like(phi)
    for run in range(len(phi)):
        rest = np.arange(len(phi)) // 2 != run // 2
        forgot = fit_gaussians(phi[rest][:, :, None], inside[rest], variance)
        never = fit_gaussians(retrained[rest][:, :, None], inside[rest], variance)
        scores[run] = log_ratio(phi[run][:, None], forgot, never)
        others[run] = log_ratio(retrained[run][:, None], forgot, never)
    return GameResult(scores, others, inside, inside)


def population_auc(phi: Phi, inside: Memberships) -> Statistic:
    """AUC of phi itself within runs: what an attack without shadow models sees."""
    return _auc(phi, phi, inside, ~inside)


def _auc(members: Phi, others: Phi, ins: Memberships, outs: Memberships) -> Statistic:
    parts = np.zeros(members.shape)
    for run, (mine, theirs) in enumerate(zip(ins, outs, strict=True)):
        above, below = placements(members[run, mine], others[run, theirs])
        parts[run, mine] += above * len(mine) / (2 * mine.sum())
        parts[run, theirs] += below * len(theirs) / (2 * theirs.sum())
    return Statistic(parts)
