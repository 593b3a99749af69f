"""Memories of activations: quantised ones to replay, and banks to find neighbours in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import NotTrained


@dataclass(frozen=True)
class Quantised:
    """Activations in 8 bits each, between the smallest and the largest of them.

    Attributes:
        codes: 0 to 255.
        low: What 0 stands for.
        high: What 255 stands for.
    """

    codes: UInt8[Tensor, "records ..."]
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Quantised:
        """Quantise; a constant tensor is kept exactly."""
        low, high = float(values.min()), float(values.max())
        scale = 255 / (high - low) if high > low else 0.0
        return cls(((values - low) * scale).round().to(torch.uint8), low, high)

    def values(self, rows: Int[Tensor, " rows"]) -> Tensor:
        """Some of them as numbers again."""
        return self.low + self.codes[rows.to(self.codes.device)].float() * ((self.high - self.low) / 255)


class ShortTerm:
    """Quantised activations of the classes of the last experiences; older ones are deleted.

    Args:
        kept: Experiences whose classes are held.
    """

    def __init__(self, kept: int):
        self.kept, self.held = kept, dict[int, tuple[int, Quantised]]()

    @property
    def classes(self) -> list[int]:
        """Classes that can be drawn."""
        return sorted(self.held)

    def add(self, experience: int, activations: Mapping[int, Tensor]) -> None:
        """Store the classes of an experience, delete those of experiences that are too old."""
        fresh = {label: (experience, Quantised.of(values)) for label, values in activations.items()}
        whole = self.held | fresh
        self.held = {label: item for label, item in whole.items() if item[0] > experience - self.kept}

    def of_class(self, label: int, count: int, random: torch.Generator) -> Tensor:
        """Activations of one class, with replacement only if there are too few."""
        stored = self.held[label][1]
        size = len(stored.codes)
        if count <= size:
            return stored.values(torch.randperm(size, generator=random)[:count])
        return stored.values(torch.randint(0, size, (count,), generator=random))

    def draw(self, count: int, random: torch.Generator) -> tuple[Tensor, Int[Tensor, " rows"]]:
        """Activations split evenly over the classes, one more for the first ones where a rest is left."""
        each, rest = divmod(count, len(self.held))
        parts, labels = list[Tensor](), list[int]()
        for position, label in enumerate(self.classes):
            number = each + (position < rest)
            if number:
                parts.append(self.of_class(label, number, random))
                labels += [label] * number
        return torch.cat(parts), torch.tensor(labels, device=parts[0].device)

    def age(self, label: int, experience: int) -> int:
        """Experiences since a class came: 0 for the experience before."""
        return experience - self.held[label][0] - 1

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        return {
            "held": [[label, when, q.codes, q.low, q.high] for label, (when, q) in sorted(self.held.items())]
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Resume."""
        self.held = {
            int(label): (int(when), Quantised(codes.to(device), float(low), float(high)))
            for label, when, codes, low, high in state["held"]
        }


def nearest_class(
    queries: Float[Tensor, "batch dim"],
    banks: Sequence[Float[Tensor, "_rows dim"]],
    masks: Sequence[Bool[Tensor, " dim"]],
    labels: Sequence[int],
    k: int,
    allowed: Bool[Tensor, "batch banks"] | None = None,
) -> Int[Tensor, " batch"]:
    """Label of most of the k nearest stored vectors; the smallest of several.

    A query is compared with a class on the units of its mask alone, both vectors of length 1 there.

    Args:
        queries: To label.
        banks: Stored vectors of each class.
        masks: Units that count for each class.
        labels: Of the classes.
        k: Neighbours, over all classes together; fewer where fewer are allowed.
        allowed: Classes that may be named, for each query.

    Raises:
        NotTrained: If there are no banks.
    """
    if not banks:
        raise NotTrained("No class is stored yet: call observe(experience) first.")
    distances = list[Tensor]()
    for number, (bank, mask) in enumerate(zip(banks, masks, strict=True)):
        near = torch.cdist(F.normalize(queries[:, mask], dim=1), F.normalize(bank[:, mask], dim=1))
        if allowed is not None:
            near = near.masked_fill(~allowed[:, number, None], float("inf"))
        distances.append(near)
    whole = torch.cat(distances, 1)
    sizes = torch.tensor([len(bank) for bank in banks], device=queries.device)
    owner = torch.tensor(list(labels), device=queries.device).repeat_interleave(sizes)
    found = whole.topk(min(k, whole.shape[1]), 1, largest=False)
    votes = F.one_hot(owner[found.indices], int(owner.max()) + 1)
    votes = votes * torch.isfinite(found.values)[:, :, None]
    return votes.sum(1).argmax(1)
