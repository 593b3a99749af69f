"""PCGrad: project the forget gradient only where it conflicts with the retain gradient.

Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.runtime import Runtime
from palimpsest.core.unlearner import check_range
from palimpsest.forget.gradient_pair import GradientPair, second_moment_used
from palimpsest.forget.projection import pcgrad, unwhiten, whiten
from palimpsest.forget.rules import rule

METRICS = ("identity", "adam", "auto")


@rule("pcgrad")
@dataclass(frozen=True)
class ConflictProjection:
    """Where forget and retain gradients point against each other, take the conflict out of the first.

    The baseline that `gu` is compared with: rank 1, no memory, and a forget gradient that happens to lower the
    retain loss stays as it is. Only the forget gradient is projected, on the retain gradient: of the published
    method, which projects every task on every other in random order, the half that protects what is retained.

    Attributes:
        metric: "identity" (published), "adam", or "auto": adam where the optimizer has a second moment.
        alpha: Weight of the retain loss where the objective has no retain term. At 0 it is protected only.
    """

    needs_retain: ClassVar[bool] = True
    metric: Literal["identity", "adam", "auto"] = "identity"
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InvalidHyperparameter(f"metric is one of {', '.join(METRICS)}, not {self.metric!r}.")
        check_range("alpha", self.alpha, 0, math.inf)

    def begin(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clip: float | None = None,
        runtime: Runtime | None = None,
    ) -> ConflictUpdate:
        """The updates of one run.

        Raises:
            InvalidHyperparameter, ModelMismatch: See `GradientPair`.
        """
        return ConflictUpdate(self, GradientPair(parameters, optimizer, clip, runtime))


class ConflictUpdate:
    """Projects at most once per optimizer step, after the last microbatch."""

    def __init__(self, settings: ConflictProjection, pair: GradientPair):
        self.pair, self.add = pair, pair.add
        self.adaptive = second_moment_used(settings.metric, pair.optimizer)

    def finish(self, retained: Callable[[], float] | None = None) -> dict[str, float]:
        """Project in conflict, and step."""
        pair = self.pair.take()
        if not pair.finite:
            return self.pair.skip(pair)
        metric = self.pair.metric() if self.adaptive else None
        forget, retain = whiten(pair.forget, metric), whiten(pair.retain, metric)
        surgery = pcgrad(forget, retain, eps=torch.finfo(torch.float32).tiny)
        before, sizes = self.pair.position(), float(forget.norm() * retain.norm())
        norm = self.pair.step(unwhiten(surgery.projected + pair.alpha * retain, metric))
        step = self.pair.position() - before
        product, length = float(pair.retain @ step), float(pair.retain.norm() * step.norm())
        return {
            **pair.row,
            "adam_metric": float(metric is not None),
            "projections": float(surgery.conflict),
            "cosine": float(forget @ retain) / sizes if sizes else math.nan,
            "gradient_product": float(forget @ retain),
            "projected_product": float(surgery.projected @ retain),
            "norm": norm,
            "realised_product": product,
            "realised_cosine": product / length if length else 0.0,
            "skipped": 0.0,
        }
