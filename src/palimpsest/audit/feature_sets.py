"""Sets of records that features are compared on: parts of the split and downstream data, each seen once a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from palimpsest.audit.distance import random_network
from palimpsest.audit.probing import RANDOM
from palimpsest.core.errors import InvalidAudit, InvalidRecords
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.selection import by_column
from palimpsest.core.task import Task
from palimpsest.data import parse_data
from palimpsest.parts.activations import capture
from palimpsest.parts.reinitialise import reinitialised

PARTS = ("forget", "retain", "forget_test", "test")
"""Sets made of the split: `forget_test` are test records of classes forgotten as a whole, `test` the others."""


@dataclass(frozen=True)
class Seen:
    """What one model shows of a set.

    Attributes:
        features: Pooled features, float64.
        logits: The outputs.
    """

    features: Float[Tensor, "rows dim"]
    logits: Float[Tensor, "rows classes"]


@dataclass(frozen=True)
class FeatureSet:
    """Records that features are compared on.

    Attributes:
        name: By which it is reported.
        records: In the order in which every model sees them.
        labels: Of the records.
        downstream: Whether it is another task's, whose labels are not the model's classes.
        part: The part of the split that it is taken from; empty for downstream sets.
        rows: Positions in that part.
    """

    name: str
    records: Records
    labels: NDArray[np.int64]
    downstream: bool = False
    part: str = ""
    rows: NDArray[np.int64] | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells the set from others of its name; the evidence keeps downstream records alive."""
        return () if self.part else (id(self.records),)


def sets_of(evidence: Evidence, downstream: Mapping[str, Any]) -> list[FeatureSet]:
    """The parts of the split that are at hand, then the downstream sets.

    Args:
        evidence: Whose split is divided.
        downstream: Records by name, or where to find them (`downstream_records`).

    Raises:
        InvalidAudit: If a downstream set has the name of a part.
        InvalidRecords: If one has no labels.
    """
    found: list[FeatureSet] = []
    for part in ("forget", "retain", "test"):
        if not evidence.has(part):
            continue
        records, labels = evidence.records(part), evidence.labels(part).astype(np.int64)
        gone = evidence.split.like_forgotten(records) if part == "test" else np.zeros(len(records), bool)
        for name, mask in (("forget_test", gone), (part, ~gone)):
            if mask.any():
                rows = np.flatnonzero(mask)
                found.append(FeatureSet(name, records.select(rows), labels[rows], part=part, rows=rows))
    for name, given in downstream.items():
        if name in PARTS or not name:
            raise InvalidAudit(f"A downstream set cannot be called '{name}': that is a part of the split.")
        records = _at_most(evidence, name, downstream_records(evidence, given))
        labels = evidence.remember(
            ("downstream labels", name, _kept(evidence, records)),
            lambda records=records: labels_of(records, evidence.task, evidence.runtime),
            "records",
        )
        found.append(FeatureSet(name, records, labels, downstream=True))
    return found


def downstream_records(evidence: Evidence, given: Records | Mapping[str, Any]) -> Records:
    """Downstream records as they are, or by name.

    Args:
        evidence: That keeps what was read.
        given: Records, or a mapping for recipes: `data` (a data set by name), `labels` (only these), and the
            settings of the data set.

    Raises:
        InvalidAudit: If a mapping names no data.
        UnknownName, AbsentClass: If there is no such data set or label.
    """
    if isinstance(given, Records):
        return given
    if not isinstance(given, Mapping) or "data" not in given:
        raise InvalidAudit(
            f"A downstream set is given as Records, or as a mapping with `data`, not as {given!r}."
        )

    def read() -> Records:
        settings = {key: value for key, value in given.items() if key not in ("data", "labels")}
        records = parse_data(given["data"], **settings)
        if not given.get("labels"):
            return records
        wanted = by_column("label", *given["labels"])
        wanted.check(records)
        return records.select(wanted.mask(records))

    return evidence.remember(("downstream", json.dumps(given, sort_keys=True, default=str)), read, "records")


def labels_of(records: Records, task: Task, runtime: Runtime) -> NDArray[np.int64]:
    """Integer labels, [records], from the column or from the field that the task calls its label.

    Raises:
        InvalidRecords: If there are none, or they are not integers.
    """
    if records.has_column("label"):
        labels = np.asarray(records.column("label"))
    else:
        field = getattr(task, "label", "label")
        batches = list(runtime.batches(records, task))
        if not batches or field not in batches[0]:
            raise InvalidRecords(
                f"The records have no labels: neither a column 'label' nor a field '{field}'."
            )
        labels = np.concatenate([torch.as_tensor(batch[field]).cpu().numpy() for batch in batches])
    if labels.dtype.kind not in "iu":
        raise InvalidRecords(f"Labels must be integers, they are {labels.dtype}.")
    return labels.astype(np.int64)


def see(evidence: Evidence, role: str, item: FeatureSet, layer: str | None = None) -> Seen:
    """What the model in a role shows of a set, computed once and shared.

    Args:
        evidence: The models.
        role: Of the model, or `RANDOM` for a randomly initialised one.
        item: The set.
        layer: Module whose pooled output are the features; the input of the head by default.

    Raises:
        InvalidAudit: If the model shows no features, they hold NaN or Inf, or there is no such layer.
        ModelMismatch: If the model cannot be initialised anew, or fails on the records.
    """
    if item.part and layer is None:
        seen = random_network(evidence, item.part) if role == RANDOM else evidence.observe(role, item.part)
        rows = torch.from_numpy(item.rows)
        if seen.features is None:
            raise InvalidAudit(f"The {role} model shows no layer before its outputs.")
        found = Seen(seen.features[rows].double(), seen.logits[rows])
    else:
        key = ("seen", item.name, *item.identity, layer, role)
        owner = UNLEARNED if role == UNLEARNED or evidence.original is None else ORIGINAL

        def look() -> Seen:
            return pass_over(_model(evidence, role), item.records, evidence.task, evidence.runtime, layer)

        found = evidence.remember(key, look, owner)
    if not torch.isfinite(found.features).all():
        raise InvalidAudit(f"The features of the {role} model on {item.name} hold NaN or Inf.")
    return found


def layers_of(evidence: Evidence, role: str, item: FeatureSet) -> dict[str, Float[Tensor, "rows width"]]:
    """Pooled inner layers of a model by name, on a set that is a part of the split."""
    rows = torch.from_numpy(item.rows)
    return {name: values[rows] for name, values in evidence.observe(role, item.part).layers.items()}


@torch.no_grad()
def pass_over(
    model: nn.Module, records: Records, task: Task, runtime: Runtime, layer: str | None = None
) -> Seen:
    """Features and logits of records whose labels need not be the model's classes, in evaluation mode.

    Raises:
        InvalidAudit: If there is no such layer, or it shows nothing.
        ModelMismatch: If the model fails on the records.
    """
    task.check(runtime.place(model), records, labels=False)
    name = layer_name(model, layer) if layer is not None else None
    features: list[Tensor] = []
    logits: list[Tensor] = []
    with evaluating(model):
        for batch in runtime.batches(records, task):
            with capture(model, [name] if name else [], getattr(task, "head", None)) as seen:
                logits.append(task.logits(model, batch).detach().float().cpu())
            rows = seen.layers.get(name) if name else seen.head_input
            if rows is None or len(rows) != len(batch["id"]):
                raise InvalidAudit(f"The model shows no features at {name or 'the input of its head'}.")
            features.append(rows.double().cpu())
    return Seen(torch.cat(features), torch.cat(logits))


def layer_name(model: nn.Module, layer: str) -> str:
    """The name of a layer in a model that may be wrapped ("avgpool" of "module.avgpool").

    Raises:
        InvalidAudit: If there is none, or not just one; lists the names.
    """
    names = [name for name, _ in model.named_modules() if name]
    if layer in names:
        return layer
    inner = [name for name in names if name.endswith(f".{layer}")]
    if len(inner) != 1:
        raise InvalidAudit(
            f"The model has no layer '{layer}'; its layers are {', '.join(names) or '(none)'}."
        )
    return inner[0]


def _model(evidence: Evidence, role: str) -> nn.Module:
    """The model in a role, or the fresh one that `random_network` looks through."""
    if role != RANDOM:
        return evidence.model(role)
    owner = ORIGINAL if evidence.original is not None else UNLEARNED

    def make() -> nn.Module:
        runtime = evidence.runtime.with_seed(evidence.runtime.derive("random network"))
        return reinitialised(evidence.model(owner), runtime)

    return evidence.remember("random network", make, owner)


def _at_most(evidence: Evidence, name: str, records: Records) -> Records:
    """All records, or a fixed sample of `evidence.limit`."""
    if not len(records):
        raise InvalidAudit(f"The downstream set '{name}' holds no record.")
    if len(records) <= evidence.limit:
        return records
    order = evidence.runtime.numpy("audit sample", name).permutation(len(records))

    def sample() -> Records:
        return records.select(np.sort(order[: evidence.limit]))

    return evidence.remember(("downstream sample", name, _kept(evidence, records)), sample, "records")


def _kept(evidence: Evidence, records: Records) -> int:
    """A number for records that is no other's as long as the evidence lives, which keeps them."""
    evidence.remember(("downstream records", id(records)), lambda: records, "records")
    return id(records)
