"""The runs of shadow models: whom they concern, what each is trained on, and what all of them say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from jaxtyping import Bool, Float, Int

from palimpsest.audit.membership.evidence_scores import same_draw
from palimpsest.audit.membership.matching import match
from palimpsest.audit.shadow import (
    Memberships,
    Seen,
    ShadowModel,
    ShadowStudy,
    check_coverage,
    observed,
    paired_halves,
)
from palimpsest.core.evidence import Evidence
from palimpsest.core.records import Records
from palimpsest.core.unlearner import Unlearner

STAGES = ("trained", "unlearned", "retrained")
"""The models of one run: before unlearning, after it, and retrained without the forgotten half."""
SHADOWS = "shadows"
"""Whom memories are about that hold for every unlearned model of a request (see `Evidence.remember`)."""
Positions = Int[np.ndarray, " chosen"]


@dataclass(frozen=True)
class Targets:
    """Records that shadow models are trained with and without.

    Attributes:
        records: All of them.
        members: Positions of forget records.
        others: Of held-out records with the same labels in the same proportions.
        kept: Of retained records.
        kept_others: Of held-out records that match them.
    """

    records: Records
    members: Positions
    others: Positions
    kept: Positions
    kept_others: Positions

    @cached_property
    def forgettable(self) -> Bool[np.ndarray, " targets"]:
        """Which of them shadow runs forget: forget records, and held-out ones like them."""
        mask = np.zeros(len(self.records), bool)
        mask[np.concatenate([self.members, self.others])] = True
        return mask


def draw_targets(evidence: Evidence, limit: int, retained: int) -> Targets:
    """Forget records and retained records, and as many held-out records of the same classes for either.

    Args:
        evidence: With a retain part.
        limit: At most this many forget records.
        retained: At most this many retained records, and no more than a quarter of them; none without
            held-out ones.
    """
    random = same_draw(evidence, "shadow targets")
    forget, retain = evidence.records("forget"), evidence.split.parts["retain"]
    nobody = np.empty(0, np.int64)
    if not evidence.has("holdout"):
        chosen = np.sort(random.permutation(len(forget))[:limit])
        return Targets(forget.select(chosen), np.arange(len(chosen)), nobody, nobody, nobody)
    holdout = evidence.records("holdout")
    members, others = _matched(evidence.labels("forget"), evidence.labels("holdout"), limit, random)
    kept, kept_others = nobody, nobody
    if retained:
        free = np.flatnonzero(~evidence.split.like_forgotten(holdout))
        most = min(retained, len(retain) // 4)
        kept, found = _matched(retain.column("label"), evidence.labels("holdout")[free], most, random)
        kept, kept_others = (kept, free[found]) if min(len(kept), len(found)) > 1 else (nobody, nobody)
    outside = np.union1d(others, kept_others)
    records = _joined(forget.select(members), _joined(holdout.select(outside), retain.select(kept)))
    first, second = len(members), len(members) + len(outside)
    return Targets(
        records,
        np.arange(first),
        first + np.searchsorted(outside, others),
        np.arange(second, len(records)),
        first + np.searchsorted(outside, kept_others),
    )


def _matched(
    inside: np.ndarray, outside: np.ndarray, limit: int, random: np.random.Generator
) -> tuple[Positions, Positions]:
    """As many positions of either side, at most `limit`, matched by label."""
    pair = match(inside, outside, random)
    members = np.sort(random.permutation(pair.members)[:limit])
    others = np.sort(random.permutation(pair.others)[: len(members)])
    return members, others


def _joined(first: Records, second: Records) -> Records:
    """Both, first before second (a plain union orders records by their place in the data)."""
    both = first.union(second)
    place = {identifier: position for position, identifier in enumerate(both.ids)}
    return both.select([place[identifier] for identifier in first.ids + second.ids])


@dataclass(frozen=True)
class ShadowRuns:
    """A number of runs over the targets.

    Every run trains on a random half of the targets and on all retained records that are no targets.

    Attributes:
        evidence: That the targets come from.
        targets: Of the attacks.
        inside: Which run is trained on which target, in complementary pairs.
        study: Where shadow models are kept; its pool begins with the targets, and so do its watched records,
            which are followed by the test part.
    """

    evidence: Evidence
    targets: Targets
    inside: Memberships
    study: ShadowStudy

    @cached_property
    def trained(self) -> list[ShadowModel]:
        """One model per run."""
        return [
            self.study.trained(self._training(row), self._seed("shadow", run))
            for run, row in enumerate(self.inside)
        ]

    @cached_property
    def retrained(self) -> list[ShadowModel]:
        """The same without the half of the forgettable targets that a run forgets, from other seeds."""
        return [
            self.study.trained(
                self._training(row & ~self.targets.forgettable), self._seed("shadow retrained", run)
            )
            for run, row in enumerate(self.inside)
        ]

    def unlearned(self, unlearner: Unlearner) -> list[ShadowModel]:
        """What a method makes of the trained model of every run."""
        return [
            self.study.forgetting(
                start, np.flatnonzero(row & self.targets.forgettable), unlearner, self._seed("unlearned", run)
            )
            for run, (start, row) in enumerate(zip(self.trained, self.inside, strict=True))
        ]

    def seen(
        self, stage: str, models: Callable[[], list[ShadowModel]], who: Unlearner | None = None
    ) -> SeenByAll:
        """What the models of a stage say; they are made if need be, and asked once for all audits."""

        def ask() -> SeenByAll:
            wanted = models()
            self.study.make(wanted, who)
            found = [self.study.seen(model) for model in wanted]
            return SeenByAll.of(found, len(self.targets.records))

        key = (
            SHADOWS,
            stage,
            repr(who),
            self.study.folder,
            self.inside.tobytes(),
            tuple(self.targets.records.ids),
        )
        return self.evidence.remember(key, ask, SHADOWS)

    def model_seen(self, role: str) -> Seen:
        """What a model in evidence says of the watched records."""
        key = (SHADOWS, "watched", tuple(self.study.watched.ids))
        ask = partial(
            observed, self.evidence.model(role), self.study.watched, self.study.task, self.study.runtime
        )
        return self.evidence.remember(key, ask, role)

    def _training(self, inside: Bool[np.ndarray, " targets"]) -> Positions:
        count = len(self.targets.records)
        return np.concatenate([np.flatnonzero(inside), np.arange(count, len(self.study.pool))])

    def _seed(self, *names: object) -> int:
        return self.evidence.runtime.derive(*names)


@dataclass(frozen=True)
class SeenByAll:
    """What one model per run says of the targets and of the population (the test part).

    Attributes:
        phi: Logit-scaled confidence in the labels of the targets.
        right: Whether the targets are classified right.
        population: phi of the population; no columns if there is none.
        population_right: Likewise.
    """

    phi: Float[np.ndarray, "runs targets"]
    right: Bool[np.ndarray, "runs targets"]
    population: Float[np.ndarray, "runs population"]
    population_right: Bool[np.ndarray, "runs population"]

    @classmethod
    def of(cls, found: list[Seen], targets: int) -> SeenByAll:
        """From what each model says of targets and population together."""
        phi, right = np.stack([one.phi for one in found]), np.stack([one.right for one in found])
        return cls(phi[:, :targets], right[:, :targets], phi[:, targets:], right[:, targets:])


def shadow_runs(
    evidence: Evidence, targets: Targets, runs: int, study: Callable[[Records, Records], ShadowStudy]
) -> ShadowRuns:
    """The runs of an audit.

    Args:
        evidence: With a retain part.
        targets: Of the attacks.
        runs: An even number.
        study: Makes the study from the pool and the watched records.
    """
    retain = evidence.split.parts["retain"]
    taken = np.isin(np.asarray(retain.ids, dtype=object), targets.records.ids)
    pool = _joined(targets.records, retain.select(~taken)) if (~taken).any() else targets.records
    watched = targets.records
    if evidence.has("test"):
        watched = _joined(targets.records, evidence.records("test"))
    random, inside = same_draw(evidence, "shadow halves"), np.zeros((runs, len(targets.records)), bool)
    for mask in (targets.forgettable, ~targets.forgettable):  # each kind of target in halves of its own
        if mask.any():
            inside[:, mask] = paired_halves(int(mask.sum()), runs, random)
    check_coverage(inside, least=3)
    return ShadowRuns(evidence, targets, inside, study(pool, watched))
