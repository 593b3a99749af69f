"""U-LiRA, RULI and the challenge score: attacks on a method, over many runs of training and forgetting."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from palimpsest.audit.membership.challenge import challenge_score, record_epsilons, score_of
from palimpsest.audit.membership.lira import Variance
from palimpsest.audit.membership.ruli import kernel_ratio
from palimpsest.audit.membership.shadow_attacks import AUDIT, not_run
from palimpsest.audit.membership.shadow_runs import STAGES, SeenByAll, ShadowRuns
from palimpsest.audit.membership.ulira import (
    GameResult,
    Statistic,
    play,
    play_against_retrained,
    population_auc,
)
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.finding import Finding, Judgement, Row
from palimpsest.core.intervals import mean_interval
from palimpsest.core.scale import judged

RUN_SPREAD = 0.02
"""Deviation of a run-averaged accuracy between repetitions."""
COARSE = 64
"""Models a side below which the challenge score is coarse (card `mia`)."""

Stages = Mapping[str, SeenByAll]


def ulira_findings(
    stages: Stages, runs: ShadowRuns, variance: Variance, rates: tuple[float, ...], exposed: int
) -> tuple[list[Finding], list[Row]]:
    """U-LiRA's game in all three stages: before unlearning, after it, and after retraining.

    Returns:
        Findings, and the records that the method leaves most exposed, by their margin between runs that
        forgot them and runs that never had them.
    """
    phi, inside = _forgettable(stages, runs)
    games = {stage: play(values, inside, variance) for stage, values in phi.items()}
    n = inside.shape[1]
    note = f"{len(inside)} shadow runs, {n} targets; original: before unlearning, control: retrained; 0.5 is perfect"
    findings = [
        _run_finding("ulira_accuracy", {s: game.accuracy for s, game in games.items()}, n, note),
        _run_finding("ulira_auc", {s: game.auc for s, game in games.items()}, n, note),
        *(_tpr_finding("ulira", games, n, rate, note) for rate in rates),
        _gap_finding(games, n),
    ]
    population = {stage: population_auc(values, inside) for stage, values in phi.items()}
    seen = "what an attack without shadow models sees in the same runs"
    findings.append(_run_finding("population_auc", population, n, seen))
    findings.append(_gain_finding(games, population, n))
    against = {
        stage: play_against_retrained(phi[stage], phi["retrained"], inside, variance).accuracy
        for stage in ("trained", "unlearned")
    }
    game = "the unlearned model against one retrained without the record"
    findings.append(_run_finding("ulira_accuracy_against_retrained", against, n, game))
    return findings, _exposed_rows(games, runs, exposed)


def ruli_findings(stages: Stages, runs: ShadowRuns, rates: tuple[float, ...]) -> list[Finding]:
    """RULI's privacy game in all three stages."""
    phi, inside = _forgettable(stages, runs)
    games = {stage: play(values, inside, attack=kernel_ratio) for stage, values in phi.items()}
    n, note = inside.shape[1], "forgotten against never trained, by kernel densities"
    return [
        _run_finding("ruli_accuracy", {s: game.accuracy for s, game in games.items()}, n, note),
        _run_finding("ruli_auc", {s: game.auc for s, game in games.items()}, n, note),
        *(_tpr_finding("ruli", games, n, rate, note) for rate in rates),
    ]


def challenge_findings(stages: Stages, runs: ShadowRuns) -> list[Finding]:
    """The forgetting score of the NeurIPS 2023 challenge, and its product with the ratios of utility.

    For each target the runs that forgot it stand against retrained models of the same runs. Retain accuracy
    is that on the retained targets that a run was trained on, test accuracy that on the test part.
    """
    phi, inside = _forgettable(stages, runs)
    order = np.argsort(~inside, axis=0, kind="stable")[: int(inside.sum(0).min())]
    mine, theirs = (np.take_along_axis(phi[stage], order, axis=0) for stage in ("unlearned", "retrained"))
    name = "challenge_forgetting"
    try:
        scores = score_of(record_epsilons(mine, theirs), len(mine))
    except InvalidAudit as problem:
        return [not_run(name, str(problem))]
    low, high = mean_interval(scores, runs.evidence.runtime.numpy("challenge"))
    note = (
        f"{len(mine)} models a side"
        + (f", coarse below {COARSE}" if len(mine) < COARSE else "")
        + "; 1 is best"
    )
    value = float(scores.mean())
    found = [Finding(AUDIT, name, value, low, high, n=len(scores), ideal=1.0, note=note)]
    accuracies = [_accuracies(stages[stage], runs) for stage in ("unlearned", "retrained")]
    if any(math.isnan(part) for pair in accuracies for part in pair):
        return [*found, not_run("challenge_score", "needs retained targets and a test part")]
    whole = challenge_score(value, *accuracies[0], *accuracies[1])
    ratio = whole / value if value else 0.0
    said = "forgetting times the ratios of retain and test accuracy to retraining"
    return [
        *found,
        Finding(AUDIT, "challenge_score", whole, low * ratio, high * ratio, n=len(scores), note=said),
    ]


def _forgettable(stages: Stages, runs: ShadowRuns) -> tuple[dict[str, np.ndarray], np.ndarray]:
    mask = runs.targets.forgettable
    return {stage: stages[stage].phi[:, mask] for stage in STAGES}, runs.inside[:, mask]


def _accuracies(seen: SeenByAll, runs: ShadowRuns) -> tuple[float, float]:
    """On retained targets that a run was trained on, and on the test part; NaN without records."""
    kept = runs.targets.kept
    trained = runs.inside[:, kept]
    right = seen.right[:, kept]
    retain = float(right[trained].mean()) if trained.any() else math.nan
    return retain, float(seen.population_right.mean()) if seen.population_right.size else math.nan


def _run_finding(name: str, stages: Mapping[str, Statistic], n: int, note: str) -> Finding:
    """A statistic over runs; the original is the stage before unlearning, the control the retrained one."""
    mine, before, control = stages["unlearned"], stages["trained"], stages.get("retrained")
    low, high = mine.interval
    finding = Finding(
        AUDIT,
        name,
        mine.value,
        low,
        high,
        n=n * len(mine.parts),
        more_is="knowledge",
        original=before.value,
        # A model cannot be told from its own kind: where that game is not played, its value is known.
        controls=(control.value if control else 0.5,),
        note=note,
    )
    error = math.hypot(before.error, control.error if control else 0.0)
    return judged(finding, sampling=error, prior=RUN_SPREAD)


def _tpr_finding(attack: str, games: Mapping[str, GameResult], n: int, alpha: float, note: str) -> Finding:
    found = {stage: game.rate(alpha) for stage, game in games.items()}
    rates = {stage: rate for stage, rate in found.items() if rate is not None}
    name = f"{attack}_tpr_at_{alpha:g}"
    if len(rates) < len(games):
        least = math.ceil(1 / alpha)
        short = f"not resolvable: a run has {n // 2} never-trained targets, {least} are needed for {alpha:g}"
        return Finding(
            AUDIT, name, None, more_is="knowledge", valid=False, judgement=Judgement.INVALID, note=short
        )
    return _run_finding(name, rates, n, note)


def _gap_finding(games: Mapping[str, GameResult], n: int) -> Finding:
    """Accuracy against the method minus accuracy against retraining, in the same runs."""
    retrained = games["retrained"].accuracy.parts
    gap = {stage: Statistic(games[stage].accuracy.parts - retrained) for stage in ("trained", "unlearned")}
    mine = gap["unlearned"]
    half = 1.96 * math.hypot(mine.error, RUN_SPREAD)
    apart = Judgement.SEPARATED if mine.value > half else Judgement.BEYOND if mine.value < -half else None
    return Finding(
        AUDIT,
        "ulira_gap",
        mine.value,
        mine.value - half,
        mine.value + half,
        n=n * len(mine.parts),
        ideal=0.0,
        original=gap["trained"].value,
        judgement=apart or Judgement.AS_RETRAINED,
        note="balanced accuracy minus that against retrained models of the same runs",
    )


def _gain_finding(games: Mapping[str, GameResult], population: Mapping[str, Statistic], n: int) -> Finding:
    """AUC of U-LiRA minus that of the population attack."""
    gain = {stage: Statistic(games[stage].auc.parts - population[stage].parts) for stage in games}
    mine = gain["unlearned"]
    half = 1.96 * mine.error
    return Finding(
        AUDIT,
        "ulira_gain",
        mine.value,
        mine.value - half,
        mine.value + half,
        n=n * len(mine.parts),
        original=gain["trained"].value,
        controls=(gain["retrained"].value,),
        note="AUC beyond that of the population attack in the same runs",
    )


def _exposed_rows(games: Mapping[str, GameResult], runs: ShadowRuns, count: int) -> list[Row]:
    where = np.flatnonzero(runs.targets.forgettable)
    is_forget = np.isin(where, runs.targets.members)
    margin = {stage: game.margin for stage, game in games.items()}
    order = [at for at in np.argsort(-margin["unlearned"], kind="stable") if is_forget[at]][:count]
    records = runs.targets.records.select(where[order])
    return [
        {
            "model": "unlearned",
            "id": identifier,
            "label": str(label),
            "score": float(margin["unlearned"][at]),
            "original": float(margin["trained"][at]),
            "control": float(margin["retrained"][at]),
            "rank": rank,
            "attack": "ulira",
            "false_alarms": None,
        }
        for rank, (at, identifier, label) in enumerate(
            zip(order, records.ids, records.column("label"), strict=True), start=1
        )
    ]
