"""Prototypes: one mean feature per label, all that is kept of old records."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.core.errors import NotTrained


class Prototypes:
    """Mean features by label; labels without one are NaN.

    Args:
        labels: How many there can be.
        dim: Of features.
        device: Where they live.
    """

    def __init__(self, labels: int, dim: int, device: torch.device):
        self.means = torch.full((labels, dim), float("nan"), device=device)

    def put(
        self, parts: Iterable[tuple[Float[Tensor, "records dim"], Int[Tensor, " records"]]]
    ) -> Int[Tensor, " new"]:
        """Means of features by label, over all parts; they replace those of the same labels.

        Returns:
            The labels.
        """
        total, count = torch.zeros_like(self.means), torch.zeros_like(self.means[:, 0])
        for features, labels in parts:
            total.index_add_(0, labels, features.detach().to(total))
            count += torch.bincount(labels, minlength=len(count))
        found = count.nonzero().flatten()
        self.means[found] = total[found] / count[found, None]
        return found

    def of(self, labels: Int[Tensor, " wanted"]) -> Float[Tensor, "wanted dim"]:
        """Means of some labels.

        Raises:
            NotTrained: Naming a label that has none.
        """
        rows = self.means[labels]
        missing = labels[rows.isnan().any(1)]
        if len(missing):
            raise NotTrained(f"There is no prototype of label {int(missing[0])} yet.")
        return rows
