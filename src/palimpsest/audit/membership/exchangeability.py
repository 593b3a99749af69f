"""Are members and non-members exchangeable? A classifier of the inputs that sees no model tells."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from palimpsest.audit.membership.evidence_scores import same_draw
from palimpsest.audit.membership.findings import widened_interval
from palimpsest.audit.membership.matching import Match
from palimpsest.audit.membership.population import CROSSFIT_WIDENING, Features, crossfit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Judgement
from palimpsest.core.intervals import auc
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task

SHIFT = 0.55
"""AUC from which the two sides count as different, if it is beyond chance."""
WIDEST = 256
"""Inputs with more numbers than this are projected at random before they are classified."""
PROJECTED = 64


def exchangeability_finding(evidence: Evidence, pair: Match, folds: int) -> Finding:
    """AUC of a cross-fitted logistic classifier of the inputs, members against non-members.

    What it finds without any model, every attack on a model may find as well. Labels need no such check:
    they are matched.
    """
    field = getattr(evidence.task, "input", "input")
    sides = [
        input_features(evidence.records(part).select(where), evidence.task, evidence.runtime, field)
        for part, where in (("forget", pair.members), ("holdout", pair.others))
    ]
    members, others = crossfit(sides[0], sides[1], same_draw(evidence, "exchangeability"), folds)
    value = auc(members, others)
    low, high = widened_interval(members, others, CROSSFIT_WIDENING)
    note = "members and non-members look alike to a classifier of the inputs"
    judgement = Judgement.GOOD
    if value > SHIFT and low > 0.5:
        judgement = Judgement.BAD
        note = "warning: members and non-members differ without any model; the attacks may measure that"
    elif value > SHIFT:
        note = f"above {SHIFT}, but not beyond chance with so few records"
    return Finding(
        "membership",
        "exchangeability",
        value,
        low,
        high,
        n=len(members) + len(others),
        ideal=0.5,
        more_is="harm",
        judgement=judgement,
        note=note,
    )


def input_features(records: Records, task: Task, runtime: Runtime, field: str = "input") -> Features:
    """Inputs as plain vectors; wide ones are projected to 64 numbers by one fixed random matrix."""
    pieces: list[np.ndarray] = []
    projection = np.empty((0, PROJECTED))
    for batch in runtime.batches(records, task):
        value = batch[field]
        array = value.double().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float64)
        flat = array.reshape(len(array), -1)
        if flat.shape[1] > WIDEST:
            if not len(projection):
                random = runtime.numpy("membership", "projection")
                projection = random.standard_normal((flat.shape[1], PROJECTED)) / np.sqrt(PROJECTED)
            flat = flat @ projection
        pieces.append(flat)
    return np.concatenate(pieces)
