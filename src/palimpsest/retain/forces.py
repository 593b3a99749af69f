"""Plasticity and stability: the two parts of a learner's gradient, step by step.

After "Continual evaluation for lifelong learning: Identifying the stability gap" (ICLR 2023), section on the
analysis of gradients: a loss is the sum of what learns the new records and of what holds on to old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Held = Tensor | Callable[[], Tensor | None]
"""The part of a loss that holds on to what was learned, weighed as in the loss; or how to compute it, None if none."""


class Forces:
    """Norms of both gradients at every step that has both parts, and the cosine between them.

    Steps of learners that do not say their parts, and those before anything is held, leave no row. What is
    measured changes nothing: the gradient of the whole loss is computed as without it.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, float, float, float | None]] = []

    def gradient_of(
        self, held: Held | None, parameters: Sequence[nn.Parameter]
    ) -> Float[Tensor, " parameters"] | None:
        """Gradient of the part that holds on, before the whole loss is differentiated; None if there is none."""
        part = held() if callable(held) else held
        if part is None:
            return None
        if not part.requires_grad:
            return torch.cat([torch.zeros_like(parameter).flatten() for parameter in parameters])
        found = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([
            (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
            for parameter, gradient in zip(parameters, found, strict=True)
        ])  # fmt: skip

    def note(
        self,
        step: int,
        experience: int,
        plasticity: Float[Tensor, " parameters"],
        stability: Float[Tensor, " parameters"],
    ) -> None:
        """Add a row: step, experience that is learned, both norms, cosine (None where a norm is 0)."""
        norms = float(plasticity.norm()), float(stability.norm())
        cosine = float(F.cosine_similarity(plasticity, stability, dim=0)) if min(norms) > 0 else None
        self.rows.append((step, experience, *norms, cosine))

    def to_dict(self) -> dict[str, list[Any]]:
        """The columns by name."""
        names = ("steps", "learning", "plasticity", "stability", "cosine")
        return {name: [row[place] for row in self.rows] for place, name in enumerate(names)}

    def load(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Resume from what `to_dict` gave."""
        names = ("steps", "learning", "plasticity", "stability", "cosine")
        self.rows = [
            (int(step), int(now), float(new), float(old), None if cosine is None else float(cosine))
            for step, now, new, old, cosine in zip(*(columns[name] for name in names), strict=True)
        ]
