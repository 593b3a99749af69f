"""What the models show on the sets, measured alike for all and remembered: CKA, neighbours, accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.audit.feature_sets import FeatureSet, Seen, layers_of, see
from palimpsest.audit.probing import LOGIT
from palimpsest.audit.set_measures import mean_cka, neighbours_on_set
from palimpsest.audit.similarity import Kernel, Short, matched_names
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence

PARTNER = {"forget": "retain", "forget_test": "test"}
"""Where the other neighbours come from if a set is of one class."""


@dataclass(frozen=True)
class Measuring:
    """The models, the sets, and how they are measured (fields of `UUEF`)."""

    evidence: Evidence
    sets: Mapping[str, FeatureSet]
    batch_size: int
    order: Literal["stored", "mixed"]
    kernel: Kernel
    short: Short
    neighbours: int
    split_seed: int
    retain_share: float
    layer: str | None

    @property
    def where(self) -> str:
        """The layer whose features are looked at, in words."""
        return self.layer or "the input of the head"

    def seen(self, role: str, item: FeatureSet) -> Seen:
        """What a model shows of a set."""
        return see(self.evidence, role, item, self.layer)

    def cka(self, item: FeatureSet, one: str, other: str, debiased: bool = False) -> float:
        """Mean CKA over batches of two models on a set."""
        return self.cka_and_batches(item, one, other, debiased)[0]

    def cka_and_batches(
        self, item: FeatureSet, one: str, other: str, debiased: bool = False
    ) -> tuple[float, int]:
        """The same, with the number of batches."""

        def compute() -> tuple[float, int]:
            mine, theirs = (self.seen(role, item).features for role in (one, other))
            return self.mean_cka(item, mine, theirs, debiased)

        how = (self.batch_size, self.order, self.kernel, self.short, self.layer, debiased)
        key = ("uuef cka", *how, item.name, *item.identity, one, other)
        return self.evidence.remember(key, compute, self._owner(one, other))

    def cka_by_layer(self, item: FeatureSet, one: str, other: str) -> dict[str, tuple[int, float]]:
        """Place and mean CKA of every layer that both have, under the other's names; without dead layers.

        Raises:
            InvalidAudit: If the layers of the two cannot be matched.
        """

        def compute() -> dict[str, tuple[int, float]]:
            mine, theirs = (layers_of(self.evidence, role, item) for role in (one, other))
            widths = [{name: values.shape[1] for name, values in layers.items()} for layers in (mine, theirs)]
            order, found = list(theirs), dict[str, tuple[int, float]]()
            for name, partner in matched_names(*widths):
                try:
                    value = self.mean_cka(item, mine[name], theirs[partner])[0]
                except InvalidAudit:  # a layer that is the same for all records has no similarity to anything
                    continue
                found[partner] = order.index(partner), value
            return found

        key = ("uuef layers", self.batch_size, self.order, self.kernel, self.short, item.name, one, other)
        return self.evidence.remember(key, compute, self._owner(one, other))

    def mean_cka(self, item: FeatureSet, x: Tensor, y: Tensor, debiased: bool = False) -> tuple[float, int]:
        """Mean CKA over batches of two tensors of features of a set."""
        order = None
        if self.order == "mixed":
            random = self.evidence.runtime.generator("uuef order", item.name)
            order = torch.randperm(len(item.records), generator=random)
        return mean_cka(x, y, self.batch_size, self.kernel, debiased, self.short, order)

    def knn(self, item: FeatureSet, role: str, on_logits: bool = False) -> tuple[float, int]:
        """Accuracy of the nearest neighbours of a set in a model, and the number of queries."""

        def rows(one: FeatureSet) -> np.ndarray[Any, Any]:
            seen = self.seen(role, one)
            return (seen.logits.double().clamp(-LOGIT, LOGIT) if on_logits else seen.features).numpy()

        def compute() -> tuple[float, int]:
            partner = self.partner(item)
            beside = (rows(partner), partner.labels) if partner is not None else None
            share = self.retain_share if item.name == "retain" else 1.0
            return neighbours_on_set(rows(item), item.labels, self.neighbours, self.split_seed, share, beside)

        how = (self.neighbours, self.split_seed, self.retain_share, self.layer, on_logits)
        key = ("uuef knn", *how, item.name, *item.identity, role)
        return self.evidence.remember(key, compute, self._owner(role))

    def partner(self, item: FeatureSet) -> FeatureSet | None:
        """The set whose records are neighbours too, for one of a single class."""
        return self.sets.get(PARTNER.get(item.name, "")) if len(np.unique(item.labels)) == 1 else None

    def accuracy(self, item: FeatureSet, role: str) -> float:
        """Share of right answers.

        Raises:
            InvalidAudit: If the models do not give as many outputs.
        """
        logits = {one: self.seen(one, item).logits for one in {*self.evidence.roles, role}}
        widths = {one: logits[one].shape[1] for one in sorted(logits)}
        if len(set(widths.values())) > 1:
            said = ", ".join(f"{one} {width}" for one, width in widths.items())
            raise InvalidAudit(
                f"The models differ in their number of outputs ({said}): accuracies say nothing."
            )
        return float((logits[role].argmax(1).numpy() == item.labels).mean())

    def to_controls(self, item: FeatureSet, role: str, debiased: bool = False) -> float | None:
        """Mean CKA to the retrained models other than the one in the role; None without one."""
        others = [one for one in self.evidence.control_roles if one != role]
        return float(np.mean([self.cka(item, role, one, debiased) for one in others])) if others else None

    def to_original(self, item: FeatureSet, role: str) -> float | None:
        """CKA to the original; None without it."""
        return self.cka(item, role, ORIGINAL) if self.evidence.original is not None else None

    def _owner(self, *roles: str) -> str:
        """The role under which something is remembered: it changes with the unlearned model only."""
        return UNLEARNED if UNLEARNED in roles or self.evidence.original is None else ORIGINAL
