"""LiRA and RMIA on the models in evidence: population findings, scores per record, the most exposed.

Every attack has one form: from what a model says of the targets (and of the population), and from what
shadow models say, to one score per target, high for a member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from palimpsest.audit.membership.findings import (
    ByRole,
    accuracy_finding,
    as_harm,
    auc_finding,
    controls_of,
    gain_finding,
    gap_finding,
    leak_finding,
    tpr_finding,
)
from palimpsest.audit.membership.lira import Variance, lira_offline, lira_online
from palimpsest.audit.membership.matching import hardest
from palimpsest.audit.membership.population import class_threshold
from palimpsest.audit.membership.rmia import rmia, tune_offline_a
from palimpsest.audit.membership.shadow_runs import SeenByAll, ShadowRuns, Targets
from palimpsest.audit.shadow import Memberships
from palimpsest.core.evidence import ORIGINAL, UNLEARNED
from palimpsest.core.finding import Finding, Judgement, Row
from palimpsest.core.intervals import clopper_pearson

AUDIT = "shadow-membership"
PLAIN = "confidence"
"""The attack without shadow models that the others are compared with: scaled confidence itself."""
POPULATION = 2000
"""Population records from which RMIA's scores are fine enough (card `mia`)."""
FEWEST_HARDEST, HARDEST = 10, 0.1

Scores = Float[np.ndarray, " records"]
Attack = Callable[[Scores, Scores, SeenByAll, Memberships], Scores]
"""phi of the targets and of the population under the attacked model, shadow models, who was trained on whom."""


@dataclass(frozen=True)
class Attacked:
    """What an attack says of every target under every model.

    Attributes:
        name: Of the attack.
        scores: By role.
        threshold: Of calling a target a member, learnt on shadow models.
        note: To print beside its findings.
    """

    name: str
    scores: Mapping[str, Scores]
    threshold: float
    note: str

    def sides(self, members: np.ndarray, others: np.ndarray) -> ByRole:
        """Scores of targets at these positions, by role."""
        return {role: (found[members], found[others]) for role, found in self.scores.items()}


def attacks_named(
    names: tuple[str, ...], variance: Variance, a: float | None, references: int
) -> dict[str, Attack]:
    """The attacks on given models that belong to names ("lira", "rmia"), the plain one first.

    Args:
        names: Of families.
        variance: Of LiRA's Gaussians.
        a: Of RMIA; None tunes it on the shadow models.
        references: Shadow models that RMIA looks at; 0 takes all.
    """

    def ratio(phi: Scores, population: Scores, shadows: SeenByAll, inside: Memberships) -> Scores:
        count = references or len(inside)
        p, z, known = expit(shadows.phi[:count]), expit(shadows.population[:count]), inside[:count]
        constant = tune_offline_a(p, known, z) if a is None else a
        return rmia(expit(phi), p, known, expit(population), z, constant)

    found: dict[str, Attack] = {PLAIN: lambda phi, *_: phi}
    if "lira" in names:
        found["online"] = lambda phi, _, shadows, inside: lira_online(
            phi[:, None], shadows.phi[:, :, None], inside, variance
        )
        found["offline"] = lambda phi, _, shadows, inside: lira_offline(
            phi[:, None], shadows.phi[:, :, None], inside, variance
        )
    if "rmia" in names:
        found["rmia"] = ratio
    return found


def attacked(name: str, attack: Attack, runs: ShadowRuns, shadows: SeenByAll) -> Attacked:
    """An attack on all models in evidence."""
    count = len(runs.targets.records)
    seen = {role: runs.model_seen(role).phi for role in runs.evidence.roles}
    scores = {role: attack(phi[:count], phi[count:], shadows, runs.inside) for role, phi in seen.items()}
    note = f"{len(runs.inside)} shadow models"
    if name == "rmia" and shadows.population.shape[1] < POPULATION:
        note += f", population of {shadows.population.shape[1]} ({POPULATION} are better)"
    return Attacked(name, scores, learnt_threshold(attack, shadows, runs), note)


def learnt_threshold(attack: Attack, shadows: SeenByAll, runs: ShadowRuns) -> float:
    """The score from which the attack calls shadow models' own targets members with most balanced accuracy.

    Each shadow model is attacked with the others, its complementary one left out as well. No score of the
    models in evidence is looked at.
    """
    inside, mask = runs.inside, runs.targets.forgettable
    members: list[Scores] = []
    others: list[Scores] = []
    for run in range(len(inside)):
        rest = np.arange(len(inside)) // 2 != run // 2
        known = SeenByAll(
            shadows.phi[rest], shadows.right[rest], shadows.population[rest], shadows.population_right[rest]
        )
        scores = attack(shadows.phi[run], shadows.population[run], known, inside[rest])
        members.append(scores[inside[run] & mask])
        others.append(scores[~inside[run] & mask])
    return class_threshold(np.concatenate(members), np.concatenate(others))


def attack_findings(
    found: Attacked, plain: Attacked, targets: Targets, rates: tuple[float, ...]
) -> list[Finding]:
    """AUC, rates, balanced accuracy and the gap to the retrained models, on forget against held-out records."""
    sides = found.sides(targets.members, targets.others)
    name = found.name
    findings = [auc_finding(AUDIT, f"{name}_auc", sides, found.note)]
    findings += [tpr_finding(AUDIT, f"{name}_tpr_at_{rate:g}", sides, rate) for rate in rates]
    said = "threshold learnt on the shadow models"
    findings.append(accuracy_finding(AUDIT, f"{name}_accuracy", sides, found.threshold, said))
    gap = gap_finding(AUDIT, f"{name}_gap", sides)
    findings += [gap] if gap is not None else []
    if name != PLAIN:
        against = plain.sides(targets.members, targets.others)
        said = "AUC beyond that of the confidence alone"
        findings.append(gain_finding(AUDIT, f"{name}_gain", sides, against, said))
    return findings


def headline_findings(
    found: Attacked, targets: Targets, shadows: SeenByAll, inside: Memberships, exposed: int
) -> list[Finding]:
    """Of the strongest attack: leaks in either direction, the hardest records, the retained, the most exposed."""
    name = found.name
    findings = [leak_finding(AUDIT, f"{name}_leak", found.sides(targets.members, targets.others))]
    findings += _hardest(found, targets, shadows, inside)
    if min(len(targets.kept), len(targets.kept_others)) > 1:
        sides = found.sides(targets.kept, targets.kept_others)
        note = f"retained records as members: {len(targets.kept)} against {len(targets.kept_others)} held-out records"
        finding = auc_finding(AUDIT, f"retain_{name}_auc", sides)
        findings.append(as_harm(finding, sides, note))
    return [*findings, _exposed_finding(found, targets, exposed)]


def _hardest(found: Attacked, targets: Targets, shadows: SeenByAll, inside: Memberships) -> list[Finding]:
    """The attack on the worst decile: records that models which never had them are least sure of."""
    share = max(HARDEST, FEWEST_HARDEST / min(len(targets.members), len(targets.others)))
    if share > 0.5:
        return []
    difficulty = -np.where(inside, 0.0, shadows.phi).sum(0) / (~inside).sum(0)
    mine, theirs = (side[hardest(difficulty[side], share)] for side in (targets.members, targets.others))
    note = f"hardest {share:.0%} of either side under shadow models without them"
    return [auc_finding(AUDIT, f"hardest_{found.name}_auc", found.sides(mine, theirs), note)]


def _exposed_finding(found: Attacked, targets: Targets, exposed: int) -> Finding:
    """Share of the forget records that score above every held-out one; the most exposed are named."""
    above = {
        role: members > others.max()
        for role, (members, others) in found.sides(targets.members, targets.others).items()
    }
    mine = above[UNLEARNED]
    low, high = clopper_pearson(int(mine.sum()), len(mine))
    named = ", ".join(str(row["id"]) for row in exposed_rows(found, targets, exposed))
    return Finding(
        AUDIT,
        "above_all_held_out",
        float(mine.mean()),
        low,
        high,
        n=len(mine),
        original=float(above[ORIGINAL].mean()) if ORIGINAL in above else None,
        controls=tuple(float(above[role].mean()) for role in controls_of(list(above))),
        note=f"share of forget records that the {found.name} attack puts above all {len(targets.others)} held-out "
        f"ones; most exposed: {named}",
    )


def exposed_rows(found: Attacked, targets: Targets, count: int) -> list[Row]:
    """The forget records that the attack is surest of, most exposed first.

    `false_alarms` is the share of held-out records (and of the record itself) that score as high: what an
    attacker who names this record must accept.
    """
    mine, others = found.scores[UNLEARNED][targets.members], np.sort(found.scores[UNLEARNED][targets.others])
    order = np.argsort(-mine, kind="stable")[:count]
    rows = _records(found, targets.members[order], targets)
    for rank, (row, score) in enumerate(zip(rows, mine[order], strict=True), start=1):
        higher = len(others) - int(np.searchsorted(others, score, side="left"))
        row |= {"rank": rank, "attack": found.name, "false_alarms": (1 + higher) / (1 + len(others))}
    return rows


def score_rows(attacks: list[Attacked], targets: Targets) -> list[Row]:
    """Scores of every target under every attack."""
    parts = {"forget": targets.members, "holdout": targets.others, "retain": targets.kept}
    only_kept = np.setdiff1d(targets.kept_others, targets.others)
    rows: list[Row] = []
    for part, positions in {**parts, "holdout": np.concatenate([targets.others, only_kept])}.items():
        for found in attacks:
            rows += [
                {**row, "part": part, "attack": found.name} for row in _records(found, positions, targets)
            ]
    return rows


def _records(found: Attacked, positions: np.ndarray, targets: Targets) -> list[Row]:
    """Scores of targets at these positions: of the unlearned model, the original and the mean control."""
    chosen = targets.records.select(positions)
    controls = controls_of(list(found.scores))
    original = found.scores[ORIGINAL][positions] if ORIGINAL in found.scores else None
    control = np.mean([found.scores[role][positions] for role in controls], axis=0) if controls else None
    return [
        {
            "model": UNLEARNED,
            "id": identifier,
            "label": str(label),
            "score": float(score),
            "original": None if original is None else float(original[place]),
            "control": None if control is None else float(control[place]),
        }
        for place, (identifier, label, score) in enumerate(
            zip(chosen.ids, chosen.column("label"), found.scores[UNLEARNED][positions], strict=True)
        )
    ]


def not_run(name: str, why: str) -> Finding:
    """A finding that says why it is missing."""
    return Finding(AUDIT, name, None, judgement=Judgement.NOT_RUN, note=why)


def bearing(finding: Finding) -> Finding:
    """The finding, made to bear on the verdict."""
    return replace(finding, bears="outputs")
