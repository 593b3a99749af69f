"""U-LiRA: a likelihood-ratio attack on an unlearning method (Hayes et al. 2024, arXiv 2403.01218).

Each shadow run trains on a random half of a pool of records (and always on the retained records), forgets
that half, and never sees the other half. After the run a record of the pool is either forgotten or never
trained; an attacker who knows how confident other runs were in either case must say which. Balanced
accuracy 0.5 is perfect unlearning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
        accuracy: Balanced accuracy of calling records with a score above 0 forgotten.
        auc: Area under the curve within runs.
        tpr: True positive rate at a false positive rate of 1 %; None if a run has fewer than 100 records
            that were never trained.
    """

    accuracy: Statistic
    auc: Statistic
    tpr: Statistic | None


def play(phi: Phi, inside: Memberships, variance: Variance = "pooled") -> GameResult:
    """Attack every run with the Gaussians of the other runs; its complementary run is left out as well.

    Leaving out the pair keeps as many runs with as without each record, so that neither hypothesis is
    favoured by a better estimate.

    Args:
        phi: Logit-scaled confidence of each record under the model of each run.
        inside: Which records a run trained on (and then forgot), in complementary pairs.
        variance: See `lira.fit_gaussians`.
    """
    scores = np.empty_like(phi)
    for run in range(len(phi)):
        rest = np.arange(len(phi)) // 2 != run // 2
        scores[run] = lira_online(phi[run][:, None], phi[rest][:, :, None], inside[rest], variance)
    return _result(scores, scores, inside, ~inside)


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
    return _result(scores, others, inside, inside)


def population_auc(phi: Phi, inside: Memberships) -> Statistic:
    """AUC of phi itself within runs: what an attack without shadow models sees."""
    return _auc(phi, phi, inside, ~inside)


def _result(members: Phi, others: Phi, ins: Memberships, outs: Memberships) -> GameResult:
    """Of scores [runs, records] of members where `ins`, and of non-members where `outs`."""
    # The halves weigh the same, so that the mean over all is the balanced accuracy.
    right = np.where(ins, (members > 0) / (2 * ins.mean()), 0.0)
    right = right + np.where(outs, (others <= 0) / (2 * outs.mean()), 0.0)
    tpr = None
    if resolvable(int(outs.sum(1).min()), ALPHA):
        hits = np.full(members.shape, np.nan)
        for run, (mine, theirs) in enumerate(zip(ins, outs, strict=True)):
            hits[run, mine] = tpr_at(members[run, mine], others[run, theirs], ALPHA).hit
        tpr = Statistic(hits)
    return GameResult(Statistic(right), _auc(members, others, ins, outs), tpr)


def _auc(members: Phi, others: Phi, ins: Memberships, outs: Memberships) -> Statistic:
    parts = np.zeros(members.shape)
    for run, (mine, theirs) in enumerate(zip(ins, outs, strict=True)):
        above, below = placements(members[run, mine], others[run, theirs])
        parts[run, mine] += above * len(mine) / (2 * mine.sum())
        parts[run, theirs] += below * len(theirs) / (2 * theirs.sum())
    return Statistic(parts)
