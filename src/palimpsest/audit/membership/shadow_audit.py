"""The shadow-membership audit: U-LiRA on the method, LiRA and RMIA on the given models (checklist A6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from palimpsest.audit.membership.evidence_scores import same_draw
from palimpsest.audit.membership.findings import ByRole, auc_finding
from palimpsest.audit.membership.lira import Variance, lira_offline, lira_online
from palimpsest.audit.membership.rmia import rmia
from palimpsest.audit.membership.shadow_runs import STAGES, draw_targets, phi_of, phi_of_part, shadow_work
from palimpsest.audit.membership.ulira import (
    ALPHA,
    GameResult,
    Statistic,
    play,
    play_against_retrained,
    population_auc,
)
from palimpsest.audit.shadow import Scores, ShadowPlan, check_coverage, paired_halves, run_shadows
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome
from palimpsest.core.needs import Need, require
from palimpsest.core.records import Records
from palimpsest.core.scale import judged
from palimpsest.core.unlearner import UNLEARNERS, Unlearner, build
from palimpsest.parts.training import TrainingRecipe, recipe_of

AT_HAND = frozenset(
    {
        Need.MODEL,
        Need.FORGET_DATA,
        Need.FORGET_LABELS,
        Need.RETAIN_DATA,
        Need.RETAIN_LABELS,
        Need.TRAINING_RECIPE,
    }
)
RUN_SPREAD = 0.02
"""Deviation of a run-averaged accuracy between repetitions."""


@audit(
    "shadow-membership",
    code="A6",
    cost=Cost.SHADOW,
    parts=("forget", "retain"),
    tasks=("classification",),
    default=False,
)
@dataclass(frozen=True)
class ShadowMembership:
    """Membership inference with shadow models: U-LiRA against the method, LiRA and RMIA against the models.

    The targets are the forget records and as many held-out records of the same classes. Each shadow run
    trains a fresh model on the retained records and a random half of the targets, forgets that half with
    the method, and retrains without it, so that for every target there are runs that forgot it and runs
    that never had it (amortised U-LiRA). `ulira_*` findings are about the method: the value is after
    unlearning, `original` before it (LiRA's online attack), the control is the retrained model, which
    must come out at 0.5. `online`, `offline` and `rmia` findings are about the given models, with the
    same shadows. Costs two trainings and one unlearning per run.

    Attributes:
        method: The method that made the unlearned model, by name or as an instance.
        settings: Its hyperparameters, if it is named.
        runs: Shadow runs, an even number; 24 show an effect on small data, claims need 64 or more.
        targets: At most this many forget records (and as many held-out ones) are targets.
        variance: Of the Gaussians: "pooled" over records suits few runs, "per-record" 64 and more.
        recipe: How to train; by default the recipe that `palimpsest.train` left on the original.
        folder: Where finished runs are kept, so that a killed audit goes on; None keeps them in memory.
        a: Constant of RMIA.
    """

    method: str | Unlearner = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    runs: int = 24
    targets: int = 500
    variance: Variance = "pooled"
    recipe: TrainingRecipe | None = None
    folder: str | Path | None = None
    a: float = 0.3

    def __post_init__(self) -> None:
        if not self.method:
            raise InvalidAudit(
                "shadow-membership must know the method: ShadowMembership(method='ssd', settings={...})."
            )
        if self.runs < 6 or self.runs % 2 or self.targets < 2:
            raise InvalidAudit(
                f"shadow-membership needs an even number of runs, at least 6, and 2 targets: got {self.runs} "
                f"and {self.targets}."
            )

    def run(self, evidence: Evidence) -> Outcome:
        """Train the shadow runs (or read them), then play U-LiRA's game and attack the given models."""
        unlearner = self._unlearner()
        base = evidence.original if evidence.original is not None else evidence.unlearned
        recipe = self.recipe or recipe_of(base)
        if recipe is None:
            raise InvalidAudit(
                "Shadow models need a training recipe: train with palimpsest.train, or give recipe=TrainingRecipe(...)."
            )
        targets, members = draw_targets(evidence, self.targets)
        plan = self._plan(evidence, targets, base, recipe, unlearner)
        check_coverage(plan.inside, least=3)
        work = shadow_work(evidence, targets, base, recipe, unlearner)
        scores = run_shadows(plan, work, evidence.runtime, self.folder)
        findings = self._method_findings(scores, plan)
        if 2 <= members <= len(targets) - 2:
            findings += self._model_findings(evidence, scores, plan, targets, members)
        return Outcome(tuple(findings))

    def _unlearner(self) -> Unlearner:
        if isinstance(self.method, str):
            unlearner = build("method", UNLEARNERS.get(self.method), self.method, self.settings)
        else:
            unlearner = self.method
        require(
            unlearner.card.name, unlearner.card.needs, AT_HAND | getattr(unlearner, "supplies", frozenset())
        )
        return unlearner

    def _plan(
        self,
        evidence: Evidence,
        targets: Records,
        base: nn.Module,
        recipe: TrainingRecipe,
        unlearner: Unlearner,
    ) -> ShadowPlan:
        inside = paired_halves(len(targets), self.runs, same_draw(evidence, "shadow halves"))
        facts = {
            "method": unlearner.card.name,
            "settings": repr(unlearner),
            "recipe": recipe.to_dict(),
            "seed": evidence.runtime.seed,
            "architecture": [(name, list(value.shape)) for name, value in base.state_dict().items()],
            "retain": evidence.split.parts["retain"].ids,
            "population": evidence.records("test").ids if evidence.has("test") else [],
        }
        return ShadowPlan(tuple(targets.ids), inside, facts)

    def _method_findings(self, scores: Scores, plan: ShadowPlan) -> list[Finding]:
        """U-LiRA's game in all three stages: before unlearning, after it, and after retraining."""
        games = {stage: play(scores[stage], plan.inside, self.variance) for stage in STAGES}
        against = {
            stage: play_against_retrained(scores[stage], scores["retrained"], plan.inside, self.variance)
            for stage in ("trained", "unlearned")
        }
        n = plan.inside.shape[1]
        note = f"{plan.runs} shadow runs, {n} targets; original: before unlearning, control: retrained; 0.5 is perfect"
        findings = [
            _run_finding("ulira_accuracy", {s: game.accuracy for s, game in games.items()}, n, note),
            _run_finding("ulira_auc", {s: game.auc for s, game in games.items()}, n, note),
            _tpr_finding(games, n, note),
        ]
        population = {stage: population_auc(scores[stage], plan.inside) for stage in STAGES}
        seen = "what an attack without shadow models sees in the same runs"
        findings.append(_run_finding("population_auc", population, n, seen))
        accuracy = {stage: game.accuracy for stage, game in against.items()}
        game = "the unlearned model against one retrained without the record"
        return [*findings, _run_finding("ulira_accuracy_against_retrained", accuracy, n, game)]

    def _model_findings(
        self, evidence: Evidence, scores: Scores, plan: ShadowPlan, targets: Records, members: int
    ) -> list[Finding]:
        """LiRA and RMIA on original, unlearned and controls: forget records against held-out ones."""
        shadows, inside = scores["trained"][:, :, None], plan.inside
        attacks: dict[str, Callable[[np.ndarray, np.ndarray | None], np.ndarray]] = {
            "online": lambda phi, _: lira_online(phi[:, None], shadows, inside, self.variance),
            "offline": lambda phi, _: lira_offline(phi[:, None], shadows, inside, self.variance),
        }
        if "population" in scores:
            attacks["rmia"] = lambda phi, others: rmia(
                _probability(phi),
                _probability(scores["trained"]),
                inside,
                _probability(np.empty(0) if others is None else others),
                _probability(scores["population"]),
                self.a,
            )
        phi = {
            role: phi_of(evidence.model(role), targets, evidence.task, evidence.runtime)
            for role in evidence.roles
        }
        others = {
            role: phi_of_part(evidence, role, "test") if "population" in scores else None
            for role in evidence.roles
        }
        findings = []
        for name, attack in attacks.items():
            found = {role: attack(phi[role], others[role]) for role in evidence.roles}
            sides: ByRole = {role: (score[:members], score[members:]) for role, score in found.items()}
            finding = auc_finding("shadow-membership", f"{name}_auc", sides, f"{plan.runs} shadow models")
            findings.append(replace(finding, bears="outputs") if name == "online" else finding)
        return findings


def _probability(phi: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-phi))


def _run_finding(name: str, stages: Mapping[str, Statistic], n: int, note: str) -> Finding:
    """A statistic over runs; the original is the stage before unlearning, the control the retrained one."""
    mine, before, control = stages["unlearned"], stages["trained"], stages.get("retrained")
    low, high = mine.interval
    finding = Finding(
        "shadow-membership",
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


def _tpr_finding(games: Mapping[str, GameResult], n: int, note: str) -> Finding:
    rates = {stage: game.tpr for stage, game in games.items() if game.tpr is not None}
    name = f"ulira_tpr_at_{ALPHA:g}"
    if len(rates) < len(games):
        short = f"not resolvable: a run has {n // 2} never-trained targets, 100 are needed for {ALPHA:g}"
        return Finding(
            "shadow-membership",
            name,
            None,
            more_is="knowledge",
            valid=False,
            judgement=Judgement.INVALID,
            note=short,
        )
    return _run_finding(name, rates, n, note)
