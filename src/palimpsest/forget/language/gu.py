"""GU: geometric disentanglement, a rule for any objective.

Zhou et al. 2025, "Geometric-Disentanglement Unlearning", arXiv 2511.17100.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.core.runtime import Runtime
from palimpsest.core.unlearner import check_range
from palimpsest.forget.gradient_pair import GradientPair, Pair, Vector, second_moment_used
from palimpsest.forget.projection import (
    Basis,
    decompose,
    disentangled,
    entanglement,
    jointly_disentangled,
    orthonormal_basis,
    unwhiten,
    whiten,
)
from palimpsest.forget.rules import rule
from palimpsest.forget.step_correction import corrected_step, largest_safe_scale

MODES = ("gradient", "realised", "both")
METRICS = ("auto", "adam", "identity")
BLOCKS = ("global", "tensor")
LARGEST_ACTIVE_RANK = 8


@rule("gu")
@dataclass(frozen=True)
class GeometricDisentanglement:
    """Take out of every forget update what lies in the span of retain gradients.

    To first order a step moves the retain loss by its inner product with the retain gradient. So the forget
    gradient loses its components along the current and the last few retain gradients, in the metric of the
    optimizer; the objective's own retain term is added whole. What is protected is the loss of the objective's
    retain term (before its weight, so also if that is 0), and where it has none the token-mean loss of retained
    records. Needs retained records at every step. For any differentiable model: the rule sees losses and
    parameters only.

    Use mode="realised" or "both" under Adam, momentum or weight decay where the promise is to hold for the step
    itself: they re-entangle what the gradient was cleared of. The promise is of first order, for the gradients
    in the basis; it is not that nothing retained is lost.

    Differs from the published code, whose projection was never called: one projection for all parameters together
    (block="tensor" is the published, stricter one); older gradients are the latest, not the first ones, and
    are measured anew in the metric of every step; the forget gradient is projected, not the sum of both.
    Before Adam's first step there is no metric but the identity ("adam_metric" is 0 in the history then).

    The history has one row per optimizer step: `cosine` of forget and retain gradient, share of the forget
    gradient that is `entangled`, share of the retain gradient that is `uncovered` by the basis, `rank` of the
    basis, `projections` and `corrections` (of gradient and step: once per optimizer step), `gradient_product` and `projected_product` (of the retain gradient
    with the forget gradient before and after), `proposed_product` and `realised_product` (with the step that
    the optimizer took, and with the one that was made), `realised_cosine` (the largest over all protected
    gradients, signed), `correction_ratio`, `scale` (of the step, by the filter) and `skipped`.

    Attributes:
        rank: Number of protected gradients, the current one included; 8 is published. At most 8 where steps
            are corrected.
        mode: "gradient": project the gradient before the optimizer sees it. "realised": let the optimizer step
            freely, and move its step to the nearest one that does no harm. "both".
        metric: "adam" (by the second moment), "identity", or "auto": adam where the optimizer has one.
        block: "global", or "tensor": every parameter tensor on its own.
        alpha: Weight of the retain loss where the objective has no retain term. At 0 it is protected only.
        tau: Of the joint variant: components whose product with the retain gradient's exceeds it help both.
        kappa: Largest length of such components that are kept, in lengths of the normal part; 0 keeps none.
        beta_rep: Weight of the retain gradient within the span in the joint variant; alpha by default.
        equality: Whether a corrected step may not lower retained losses either.
        budget: Largest rise of the real retain loss by a step, in nats (1e-4 is published): longer steps are
            halved until they keep it, at most 6 times, and left out after that. None does not look.
    """

    needs_retain: ClassVar[bool] = True
    rank: int = 8
    mode: Literal["gradient", "realised", "both"] = "gradient"
    metric: Literal["auto", "adam", "identity"] = "auto"
    block: Literal["global", "tensor"] = "global"
    alpha: float = 0.0
    tau: float = 0.0
    kappa: float = 0.0
    beta_rep: float | None = None
    equality: bool = False
    budget: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("metric", METRICS), ("block", BLOCKS)):
            if getattr(self, name) not in known:
                raise InvalidHyperparameter(
                    f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}."
                )
        if self.rank != int(self.rank):
            raise InvalidHyperparameter(f"rank must be a whole number, not {self.rank!r}.")
        check_range("rank", self.rank, 1, LARGEST_ACTIVE_RANK if self.corrects else math.inf)
        for name in ("alpha", "tau", "kappa", "beta_rep", "budget"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, math.inf)

    @property
    def projects(self) -> bool:
        """Whether gradients are projected."""
        return self.mode != "realised"

    @property
    def corrects(self) -> bool:
        """Whether steps are corrected."""
        return self.mode != "gradient"

    @property
    def joint(self) -> bool:
        """Whether components that help both losses may be kept."""
        return self.kappa > 0 or self.beta_rep is not None

    def begin(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clip: float | None = None,
        runtime: Runtime | None = None,
    ) -> DisentangledUpdate:
        """The updates of one run.

        Raises:
            InvalidHyperparameter, ModelMismatch: If parameters or optimizer are not fit for it (see
                `GradientPair`), or steps of parameters in less than single precision should be corrected.
        """
        if self.corrects and any(p.dtype not in (torch.float32, torch.float64) for p in parameters):
            raise InvalidHyperparameter(
                f"mode={self.mode!r} needs float32 parameters: rounding to {parameters[0].dtype} undoes corrections."
            )
        return DisentangledUpdate(self, GradientPair(parameters, optimizer, clip, runtime))


class DisentangledUpdate:
    """Projects once per optimizer step, after the last microbatch.

    Args:
        settings: Of the rule.
        pair: Accumulates both gradients.
    """

    def __init__(self, settings: GeometricDisentanglement, pair: GradientPair):
        self.settings, self.pair = settings, pair
        self.adaptive = second_moment_used(settings.metric, pair.optimizer)
        self.older: deque[Vector] = deque(maxlen=settings.rank - 1)
        self.add = pair.add

    def finish(self, retained: Callable[[], float] | None = None) -> dict[str, float]:
        """Project, step, correct the step, remember the retain gradient."""
        filtered = self.settings.budget is not None
        if filtered and retained is None:
            raise MissingNeed(
                "budget looks at the real retain loss: hand `finish` a function that measures it."
            )
        pair = self.pair.take()
        if not pair.finite:
            return self.pair.skip(pair)
        protected = [pair.retain, *self.older]
        gradient, row = self._projected(pair, protected)
        before, loss = self.pair.position(), retained() if filtered and retained else 0.0
        row["norm"] = self.pair.step(gradient)
        proposed = self.pair.position() - before
        row["proposed_product"] = float(pair.retain @ proposed)
        if self.settings.corrects:
            row |= {"corrections": 1.0, "correction_ratio": self._correct(before, proposed, protected)}
        if filtered and retained:
            row["scale"] = self._shorten(before, lambda: retained() - loss)
        row |= self._realised(self.pair.position() - before, protected)
        if pair.retain.any():
            self.older.appendleft(pair.retain)
        return {**pair.row, **row, "skipped": 0.0}

    def _projected(self, pair: Pair, protected: list[Vector]) -> tuple[Vector, dict[str, float]]:
        """The gradient for the optimizer, and what was seen on the way."""
        metric = self.pair.metric() if self.adaptive else None
        forget, *retained = (whiten(vector, metric) for vector in (pair.forget, *protected))
        parts = self.pair.slices if self.settings.block == "tensor" else [slice(None)]
        bases = [orthonormal_basis([vector[part] for vector in retained]) for part in parts]
        row = {
            "adam_metric": float(metric is not None),
            "rank": float(max(len(basis) for basis in bases)),
            **_entanglement(forget, retained[0], parts, bases),
            "gradient_product": float(forget @ retained[0]),
        }
        if not self.settings.projects:
            return pair.forget + pair.alpha * pair.retain, {**row, "projections": 0.0}
        pieces = [
            self._combined(forget[part], retained[0][part], basis, pair.alpha)
            for part, basis in zip(parts, bases, strict=True)
        ]
        whitened = torch.cat(pieces)
        row["projected_product"] = float((whitened - pair.alpha * retained[0]) @ retained[0])
        return unwhiten(whitened, metric), {**row, "projections": 1.0}

    def _combined(self, forget: Vector, retain: Vector, basis: Basis, alpha: float) -> Vector:
        settings = self.settings
        if not settings.joint:
            return disentangled(forget, retain, basis, alpha=alpha)
        weight = alpha if settings.beta_rep is None else settings.beta_rep
        return jointly_disentangled(
            forget, retain, basis, beta_rep=weight, tau=settings.tau, kappa=settings.kappa
        )

    def _correct(self, before: Vector, proposed: Vector, protected: list[Vector]) -> float:
        """Replace the step by the nearest harmless one, in the metric after it; how far that is."""
        metric, gradients = self.pair.metric() if self.adaptive else None, torch.stack(protected)
        parts = self.pair.slices if self.settings.block == "tensor" else [slice(None)]
        steps = [
            corrected_step(
                proposed[part],
                gradients[:, part],
                None if metric is None else metric[part],
                self.settings.equality,
            ).step
            for part in parts
        ]
        step, size = torch.cat(steps), float(proposed.norm())
        self.pair.move(before + step)
        return float((step - proposed).norm()) / size if size else 0.0

    def _shorten(self, before: Vector, rise: Callable[[], float]) -> float:
        """The finite-step filter; leaves the parameters at the scale that it gives."""
        step = self.pair.position() - before

        def at(scale: float) -> float:
            self.pair.move(before + scale * step)
            return rise()

        scale = largest_safe_scale(at, self.settings.budget or 0.0)
        self.pair.move(before + scale * step)
        return scale

    def _realised(self, step: Vector, protected: list[Vector]) -> dict[str, float]:
        """What the step that was made does to the protected losses, to first order."""
        size = float(step.norm())
        scales = [size * float(gradient.norm()) for gradient in protected]
        products = [float(gradient @ step) for gradient in protected]
        cosines = [product / scale for product, scale in zip(products, scales, strict=True) if scale > 0]
        return {"realised_product": products[0], "realised_cosine": max(cosines, default=0.0)}


def _entanglement(forget: Tensor, retain: Tensor, parts: list[slice], bases: list[Basis]) -> dict[str, float]:
    """Diagnostics over all blocks together."""
    if len(parts) == 1:
        found = entanglement(forget, retain, bases[0])
        return {"cosine": found.cosine, "entangled": found.share, "uncovered": found.uncovered}
    within = sum(float(decompose(forget[p], b)[1].square().sum()) for p, b in zip(parts, bases, strict=True))
    outside = sum(float(decompose(retain[p], b)[0].square().sum()) for p, b in zip(parts, bases, strict=True))
    sizes = float(forget.norm()), float(retain.norm())
    return {
        "cosine": float(forget @ retain) / (sizes[0] * sizes[1]) if sizes[0] * sizes[1] else math.nan,
        "entangled": within / sizes[0] ** 2 if sizes[0] else 0.0,
        "uncovered": outside**0.5 / sizes[1] if sizes[1] else 0.0,
    }
