"""The shadow-membership audit: U-LiRA on the method, LiRA and RMIA on the given models (checklist A6)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from palimpsest.audit.membership.lira import Variance
from palimpsest.audit.membership.method_attacks import challenge_findings, ruli_findings, ulira_findings
from palimpsest.audit.membership.shadow_attacks import (
    PLAIN,
    attack_findings,
    attacked,
    attacks_named,
    bearing,
    exposed_rows,
    headline_findings,
    not_run,
    score_rows,
)
from palimpsest.audit.membership.shadow_runs import SHADOWS, STAGES, ShadowRuns, draw_targets, shadow_runs
from palimpsest.audit.shadow import ShadowStudy
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.errors import InvalidAudit, UnknownName
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.needs import Need, require
from palimpsest.core.records import Records
from palimpsest.core.unlearner import UNLEARNERS, Unlearner, build
from palimpsest.core.writing import check_writable
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
ON_MODELS, ON_METHOD = ("lira", "rmia"), ("ulira", "ruli", "challenge")
VARIANCES = ("pooled", "per-record", "global")


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

    The targets are the forget records, some retained records, and as many held-out records of the same
    classes for either. Each shadow run trains a fresh model on a random half of the targets and on all other
    retained records, so that for every target there are models with it and without.

    `online`, `offline` (LiRA) and `rmia` findings are about the given models, `confidence` is the attack
    without shadow models on the same records. Every attack gives AUC, true positive rates at low false
    positive rates, balanced accuracy at a threshold learnt on shadow models, and the gap to the retrained
    models; the strongest also the hardest tenth, the retained records, and the most exposed records by id
    (series `exposed`; all scores are in the series `membership_scores`).

    For `ulira` and `ruli` findings each run then forgets its half of the forget and held-out targets with
    the method, and another model is retrained without it (amortised U-LiRA): the value is after unlearning,
    `original` before it (LiRA's online attack), the control is the retrained model, which must come out at
    0.5. "challenge" adds the score of the NeurIPS 2023 challenge over the same models.

    Shadow models are kept in a folder by a hash of architecture, recipe, records and seed. They are trained
    once for all attacks, all methods and all later audits; a killed audit goes on where it was.

    Attributes:
        method: The method that made the unlearned model, by name or as an instance. A study knows it; for an
            original that is judged as it is, "ulira" repeats doing nothing.
        settings: Its hyperparameters, if it is named.
        runs: Shadow runs, an even number; 24 show an effect on small data, claims need 64 or more.
        targets: At most this many forget records (and as many held-out ones) are targets.
        variance: Of the Gaussians: "pooled" over records suits few runs, "per-record" 64 and more.
        recipe: How to train; by default the recipe that `palimpsest.train` left on the original.
        folder: Where shadow models are kept. In a study None takes a folder beside its weights; elsewhere
            they are gone when the audit is over.
        a: Constant of RMIA; None tunes it by attacking one shadow model with the others.
        attacks: Any of "lira", "rmia", "ulira", "ruli", "challenge"; as a list, or in one text with commas.
        workers: Processes that train shadow models side by side; 0 trains in this one.
        retained: At most this many retained records are targets.
        rates: False positive rates at which true positive rates are given.
        exposed: How many of the most exposed records are listed.
        references: Shadow models that RMIA looks at; 0 takes all.
    """

    method: str | Unlearner = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    runs: int = 24
    targets: int = 500
    variance: Variance = "pooled"
    recipe: TrainingRecipe | None = None
    folder: str | Path | None = None
    a: float | None = 0.3
    attacks: tuple[str, ...] = ("lira", "rmia", "ulira", "ruli")
    workers: int = 0
    retained: int = 200
    rates: tuple[float, ...] = (0.01, 0.001)
    exposed: int = 20
    references: int = 0

    def __post_init__(self) -> None:
        given = self.attacks.split(",") if isinstance(self.attacks, str) else self.attacks
        object.__setattr__(self, "attacks", tuple(name.strip() for name in given))
        object.__setattr__(self, "rates", tuple(self.rates))
        for name in self.attacks:
            if name not in (*ON_MODELS, *ON_METHOD):
                raise UnknownName("attack with shadow models", name, (*ON_MODELS, *ON_METHOD))
        if self.variance not in VARIANCES:
            raise UnknownName("variance", str(self.variance), VARIANCES)
        if self.runs < 6 or self.runs % 2 or self.targets < 2:
            raise InvalidAudit(
                f"shadow-membership needs an even number of runs, at least 6, and 2 targets: got {self.runs} "
                f"and {self.targets}."
            )
        if min(self.workers, self.retained, self.exposed, self.references) < 0 or self.references == 1:
            raise InvalidAudit(
                "workers, retained and exposed must be at least 0, references 0 or at least 2: got "
                f"{self.workers}, {self.retained}, {self.exposed} and {self.references}."
            )
        if not self.attacks or not all(0 < rate < 1 for rate in self.rates):
            raise InvalidAudit(f"There must be an attack, and rates in (0, 1): {self.attacks}, {self.rates}.")
        if self.a is not None and not 0 <= self.a <= 1:
            raise InvalidAudit(f"RMIA needs a in [0, 1], or None to tune it, not {self.a}.")

    def check(self, evidence: Evidence) -> None:
        """Find out before any work whether method, recipe and folder will do.

        Raises:
            InvalidAudit: If the method or the training recipe is not known.
            MissingNeed: If shadow models cannot give the method what it needs.
            CannotWrite: If the folder cannot be written.
        """
        self._recipe(evidence)
        if set(ON_METHOD) & set(self.attacks):
            self._unlearner(evidence)
        if self.folder is not None:
            check_writable(self.folder)

    def run(self, evidence: Evidence) -> Outcome:
        """Train shadow models (or read them), attack the given models, then the method."""
        self.check(evidence)
        targets = draw_targets(evidence, self.targets, self.retained)

        def study(pool: Records, watched: Records) -> ShadowStudy:
            return ShadowStudy(
                self._base(evidence), pool, watched, evidence.task, evidence.runtime, self._recipe(evidence),
                self._place(evidence), self.workers, evidence.split.test,
            )  # fmt: skip

        runs = shadow_runs(evidence, targets, self.runs, study)
        findings: list[Finding] = []
        series: dict[str, tuple[Row, ...]] = {}
        if set(ON_MODELS) & set(self.attacks):
            if min(len(targets.members), len(targets.others)) < 2:
                why = "needs held-out records with the labels of the forget records"
                findings += [not_run(f"{name}_auc", why) for name in ON_MODELS if name in self.attacks]
            else:
                findings += self._on_models(runs, series)
        if set(ON_METHOD) & set(self.attacks):
            findings += self._on_method(runs, series, self._unlearner(evidence))
        return Outcome(tuple(findings), series)

    def _on_models(self, runs: ShadowRuns, series: dict[str, tuple[Row, ...]]) -> list[Finding]:
        """LiRA and RMIA on original, unlearned and controls: forget records against held-out ones."""
        targets = runs.targets
        shadows = runs.seen("trained", lambda: runs.trained)
        wanted = attacks_named(self.attacks, self.variance, self.a, self.references)
        without = "rmia" in wanted and not shadows.population.shape[1]
        findings = [not_run("rmia_auc", "needs a test part as its population")] if without else []
        if without:
            wanted.pop("rmia")
        found = {name: attacked(name, attack, runs, shadows) for name, attack in wanted.items()}
        headline = "online" if "online" in found else list(found)[-1]
        for name, one in found.items():
            mine = attack_findings(one, found[PLAIN], targets, self.rates)
            findings += [bearing(mine[0]), *mine[1:]] if name == headline else mine
        strongest = found[headline]
        findings += headline_findings(strongest, targets, shadows, runs.inside, self.exposed)
        series["exposed"] = tuple(exposed_rows(strongest, targets, self.exposed))
        series["membership_scores"] = tuple(score_rows(list(found.values()), targets))
        return findings

    def _on_method(
        self, runs: ShadowRuns, series: dict[str, tuple[Row, ...]], unlearner: Unlearner | None
    ) -> list[Finding]:
        """U-LiRA, RULI and the challenge on what the method makes of shadow models."""
        stages = {stage: runs.seen(stage, lambda: runs.trained) for stage in STAGES[:1]}
        if unlearner is None:
            stages["unlearned"] = stages["trained"]
        else:
            stages["unlearned"] = runs.seen("unlearned", lambda: runs.unlearned(unlearner), unlearner)
        stages["retrained"] = runs.seen("retrained", lambda: runs.retrained)
        findings: list[Finding] = []
        if "ulira" in self.attacks:
            found, rows = ulira_findings(stages, runs, self.variance, self.rates, self.exposed)
            findings += found
            series["exposed"] = (*series.get("exposed", ()), *rows)
        if "ruli" in self.attacks:
            findings += ruli_findings(stages, runs, self.rates)
        if "challenge" in self.attacks:
            findings += challenge_findings(stages, runs)
        return findings

    def _unlearner(self, evidence: Evidence) -> Unlearner | None:
        """The method; None for doing nothing."""
        if isinstance(self.method, str) and self.method:
            unlearner = build("method", UNLEARNERS.get(self.method), self.method, self.settings)
        elif self.method:
            unlearner = cast(Unlearner, self.method)
        elif evidence.method is not None:
            unlearner = evidence.method
        elif evidence.unlearned is evidence.original:
            return None
        else:
            raise InvalidAudit(
                "shadow-membership must know the method: ShadowMembership(method='ssd', settings={...}), or leave "
                "U-LiRA out: attacks=('lira', 'rmia')."
            )
        have = AT_HAND | getattr(unlearner, "supplies", frozenset[Need]())
        require(unlearner.card.name, unlearner.card.needs, have)
        return unlearner

    def _base(self, evidence: Evidence) -> nn.Module:
        return evidence.original if evidence.original is not None else evidence.unlearned

    def _recipe(self, evidence: Evidence) -> TrainingRecipe:
        recipe = self.recipe or recipe_of(self._base(evidence))
        if recipe is None:
            raise InvalidAudit(
                "Shadow models need a training recipe: train with palimpsest.train, or give recipe=TrainingRecipe(...)."
            )
        return recipe

    def _place(self, evidence: Evidence) -> Path:
        if self.folder is not None:
            return Path(self.folder)
        if evidence.folder is not None:
            return evidence.folder / "shadows"
        made = evidence.remember(
            "shadow folder", lambda: tempfile.TemporaryDirectory(prefix="palimpsest-"), SHADOWS
        )
        return Path(made.name)
