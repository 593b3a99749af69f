"""What a shadow run of U-LiRA does: whom it concerns, what it trains, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from palimpsest.audit.membership.evidence_scores import same_draw
from palimpsest.audit.membership.matching import match
from palimpsest.audit.membership.signals import scaled_confidence
from palimpsest.audit.shadow import Scores, train_shadow
from palimpsest.core.evidence import Evidence, observe_all
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Unlearner
from palimpsest.parts.training import TrainingRecipe

STAGES = ("trained", "unlearned", "retrained")
"""The models of one run: before unlearning, after it, and retrained without the forgotten half."""


def draw_targets(evidence: Evidence, limit: int) -> tuple[Records, int]:
    """Forget records, then as many held-out records of the same classes; and how many are of the former."""
    forget = evidence.records("forget")
    random = same_draw(evidence, "shadow targets")
    if not evidence.has("holdout"):
        chosen = np.sort(random.permutation(len(forget))[:limit])
        return forget.select(chosen), len(chosen)
    holdout = evidence.records("holdout")
    pair = match(evidence.labels("forget"), evidence.labels("holdout"), random)
    size = min(limit, len(pair.members))
    members = np.sort(random.permutation(pair.members)[:size])
    others = np.sort(random.permutation(pair.others)[:size])
    return _joined(forget.select(members), holdout.select(others)), size


def _joined(first: Records, second: Records) -> Records:
    """Both, first before second (a plain union orders records by their place in the data)."""
    both = first.union(second)
    place = {identifier: position for position, identifier in enumerate(both.ids)}
    return both.select([place[identifier] for identifier in first.ids + second.ids])


def shadow_work(
    evidence: Evidence, targets: Records, base: nn.Module, recipe: TrainingRecipe, unlearner: Unlearner
) -> Callable[[int, np.ndarray], Scores]:
    """The work of one shadow run: train, unlearn, retrain; phi of all targets under all three."""
    task, retain = evidence.task, evidence.split.parts["retain"]
    population = evidence.records("test") if evidence.has("test") else None

    def work(run: int, inside: np.ndarray) -> Scores:
        forget = targets.select(inside)
        runtime = evidence.runtime.with_seed(evidence.runtime.derive("shadow", run))
        split = ForgetSplit(forget, retain, evidence.split.test, description=f"shadow run {run}")
        trained = train_shadow(base, split.train, task, runtime, recipe)
        # Own seeds, so that no model starts from another one's initial weights.
        unlearned = unlearner.unlearn(trained, split, task, runtime.with_seed(runtime.derive("unlearned")))
        retrained = train_shadow(base, retain, task, runtime.with_seed(runtime.derive("retrained")), recipe)
        models = dict(zip(STAGES, (trained, unlearned, retrained), strict=True))
        scores = {stage: phi_of(model, targets, task, runtime) for stage, model in models.items()}
        if population is not None:
            scores["population"] = phi_of(trained, population, task, runtime)
        return scores

    return work


def phi_of(model: nn.Module, records: Records, task: Task, runtime: Runtime) -> Float[np.ndarray, " records"]:
    """Logit-scaled confidence of a model in the labels of records."""
    labels = torch.from_numpy(records.column("label").astype(np.int64))
    return scaled_confidence(observe_all(model, records, task, runtime).logits, labels).numpy()


def phi_of_part(evidence: Evidence, role: str, part: str) -> Float[np.ndarray, " records"]:
    """Logit-scaled confidence of a model in evidence on a part, from its shared pass."""
    labels = torch.from_numpy(evidence.labels(part).astype(np.int64))
    return scaled_confidence(evidence.observe(role, part).logits, labels).numpy()
