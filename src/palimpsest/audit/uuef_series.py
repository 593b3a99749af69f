"""Series of the protocol: the table by model and set, CKA by layer, and the picture of the features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.audit.feature_sets import FeatureSet
from palimpsest.audit.probing import RANDOM
from palimpsest.audit.projection import principal_plane, sample_by_group, turned_towards
from palimpsest.audit.set_measuring import Measuring
from palimpsest.core.errors import InvalidAudit, ModelMismatch
from palimpsest.core.evidence import ORIGINAL, UNLEARNED
from palimpsest.core.finding import Row

RETAINED = "retained"
"""The group of retained records in the picture."""


def table(work: Measuring) -> list[Row]:
    """One row per model and set: every figure, and its gap to the retrained models on the same set.

    The gap of a retrained model is to the others. The model "random" has fresh weights.
    """
    rows: list[Row] = []
    roles = (*work.evidence.roles, RANDOM)
    for item in work.sets.values():
        found = {
            name: {role: _or_none(measure, role) for role in roles}
            for name, measure in _columns(work, item).items()
        }
        about: Row = {
            "set": item.name, "downstream": item.downstream, "rows": len(item.records),
            "batches": _batches(work, item), "layer": work.where,
        }  # fmt: skip
        for role in roles:
            row: Row = {"model": role, **about}
            for name, values in found.items():
                mine = values[role]
                others = [values[one] for one in work.evidence.control_roles if one != role]
                known = [value for value in others if value is not None]
                gap = mine - float(np.mean(known)) if mine is not None and known else None
                row |= {name: mine, f"{name}_gap": gap}
            rows.append(row)
    return rows


def _columns(work: Measuring, item: FeatureSet) -> dict[str, Callable[[str], float | None]]:
    similar: dict[str, Callable[[str], float | None]] = {
        "cka_to_retrained": partial(work.to_controls, item),
        "cka_to_retrained_debiased": partial(work.to_controls, item, debiased=True),
        "cka_to_original": partial(work.to_original, item),
        "knn_features": lambda role: work.knn(item, role)[0],
        "knn_logits": lambda role: work.knn(item, role, True)[0],
    }
    # A downstream task has other classes than the model.
    return similar if item.downstream else {"accuracy": partial(work.accuracy, item), **similar}


def _or_none(measure: Callable[[str], float | None], role: str) -> float | None:
    try:
        return measure(role)
    except (InvalidAudit, ModelMismatch):  # the findings say why
        return None


def _batches(work: Measuring, item: FeatureSet) -> int | None:
    partner = next((role for role in work.evidence.roles if role != UNLEARNED), None)
    try:
        return work.cka_and_batches(item, UNLEARNED, partner)[1] if partner else None
    except (InvalidAudit, ModelMismatch):
        return None


def by_layer(work: Measuring) -> list[Row]:
    """CKA to the original and to a retrained model, layer by layer; the outputs are the last."""
    original = [ORIGINAL] if work.evidence.original is not None else []
    return [
        row
        for item in work.sets.values()
        if item.part
        for partner in [*original, *work.evidence.control_roles[:1]]
        for role in work.evidence.roles
        if role != partner
        for row in _pair_by_layer(work, item, role, partner)
    ]


def _pair_by_layer(work: Measuring, item: FeatureSet, role: str, partner: str) -> list[Row]:
    try:
        found = work.cka_by_layer(item, role, partner)
    except InvalidAudit:  # the findings say why, or the architectures have no layer in common
        return []
    about: Row = {"model": role, "against": partner.removesuffix(" 0"), "set": item.name}
    return [{**about, "layer": name, "order": place, "cka": value} for name, (place, value) in found.items()]


def picture(work: Measuring, most: int) -> list[Row]:
    """Forget and retain records in the plane of each model's features, turned towards the first model's.

    Args:
        work: The models and sets.
        most: At most this many records of every group, the same ones for all models.
    """
    items = [work.sets[name] for name in ("forget", "retain") if name in work.sets]
    forgotten = work.evidence.split.forgotten_labels
    groups = np.concatenate([_groups(item, forgotten) for item in items])
    chosen = sample_by_group(groups, most, work.evidence.runtime.numpy("uuef picture"))
    where = torch.from_numpy(chosen)
    first: Tensor | None = None
    rows: list[Row] = []
    for role in (ORIGINAL, *work.evidence.control_roles[:1], UNLEARNED):
        if role not in work.evidence.roles:
            continue
        try:
            features = torch.cat([work.seen(role, item).features for item in items])
            points, share = principal_plane(features[where])
        except InvalidAudit:  # the findings say why
            continue
        points = points if first is None else turned_towards(points, first)
        first = points if first is None else first
        rows += [
            {"model": role, "group": str(group), "x": x, "y": y, "share": share}
            for group, (x, y) in zip(groups[chosen], points.tolist(), strict=True)
        ]
    return rows


def _groups(item: FeatureSet, forgotten: list[Any]) -> NDArray[np.object_]:
    """What a record is coloured by: its class if that was forgotten as a whole, else its part."""
    if item.name == "retain":
        return np.full(len(item.labels), RETAINED, dtype=object)
    names = [f"class {label}" if label in forgotten else "forgotten" for label in item.labels]
    return np.array(names, dtype=object)
