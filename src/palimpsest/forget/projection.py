"""Geometric disentanglement: the part of a forget update that leaves the retain loss alone, to first order.

Zhou et al. 2025, "Geometric-Disentanglement Unlearning", arXiv 2511.17100. A step moves the retain loss by its
inner product with the retain gradients; so what lies in their span is taken out of the forget gradient, in the
metric of the optimiser. Everything here is algebra on flat vectors over the selected parameters; gradients are
those of losses as they are minimised (ascent is descent on minus the loss).

The promise is of first order, for the gradients in the basis and the selected parameters. Momentum, a new
denominator and weight decay re-entangle the step that an optimiser takes: `forget/step_correction.py` corrects
the step itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch, NonFinite
from palimpsest.core.unlearner import check_range

Vector = Float[Tensor, " dim"]
Basis = Float[Tensor, "rank dim"]
"""Orthonormal rows."""

_NOISE = 1e-5


# The metric of Adam


def adam_metric(second_moment: Vector, step: int, beta2: float = 0.999, eps: float = 1e-8) -> Vector:
    """Denominator of Adam's step, h = sqrt(v / (1 - beta2^t)) + eps: its measure of lengths.

    Args:
        second_moment: v, Adam's `exp_avg_sq`.
        step: t, number of steps taken, at least 1: before the first there is no metric but the identity.
        beta2: Decay of v.
        eps: Adam's.

    Raises:
        InvalidHyperparameter: If a value is out of range.
    """
    check_range("step", step, 1, float("inf"))
    check_range("eps", eps, 0, float("inf"))
    if not 0 <= beta2 < 1:
        raise InvalidHyperparameter(f"beta2 must lie in [0, 1), not {beta2!r}.")
    return (second_moment.float() / (1 - beta2**step)).sqrt() + eps


def whiten(gradient: Vector, metric: Vector | None) -> Vector:
    """Gradient in coordinates in which the metric is the identity: g / sqrt(h). None is the identity."""
    return gradient.float() if metric is None else gradient.float() / metric.sqrt()


def unwhiten(whitened: Vector, metric: Vector | None) -> Vector:
    """The raw gradient that has these whitened coordinates: z * sqrt(h)."""
    return whitened if metric is None else whitened * metric.sqrt()


def step_direction(whitened: Vector, metric: Vector | None) -> Vector:
    """The direction that an optimiser with this metric moves along: z / sqrt(h), that is gradient / h."""
    return whitened if metric is None else whitened / metric.sqrt()


# The protected span


def orthonormal_basis(vectors: Sequence[Vector], tolerance: float = 1e-6) -> Basis:
    """Gram-Schmidt in single precision, each vector against those before it, twice.

    Args:
        vectors: Whitened retain gradients, the current one first: it is always represented.
        tolerance: A vector is dropped if its residual is shorter than this share of it. Zero vectors are.

    Returns:
        [rank, dim]; rank 0 if all are zero.

    Raises:
        InvalidHyperparameter: If there are no vectors.
        ModelMismatch: If their lengths differ.
        NonFinite: If one holds NaN or Inf: it must never enter the basis.
    """
    if not vectors:
        raise InvalidHyperparameter(
            "A basis needs at least one vector; pass a zero vector to protect nothing."
        )
    if len({tuple(vector.shape) for vector in vectors}) > 1 or vectors[0].dim() != 1:
        raise ModelMismatch(
            f"Flat vectors of one length are needed, not {[tuple(vector.shape) for vector in vectors]}."
        )
    basis = vectors[0].new_zeros((0, len(vectors[0])), dtype=torch.float32)
    for number, vector in enumerate(vectors):
        vector = vector.detach().float()
        scale = vector.abs().amax()
        if not torch.isfinite(scale):
            raise NonFinite(f"Retain gradient {number} holds NaN or Inf.")
        if scale == 0:
            continue
        unit = vector / scale  # squares of tiny gradients would underflow
        unit = unit / unit.norm()
        residual = _without(unit, basis)
        size = residual.norm()
        if size > tolerance:
            basis = torch.cat([basis, _without(residual / size, basis)[None]])
            basis[-1] /= basis[-1].norm()
    return basis


def decompose(vector: Vector, basis: Basis) -> tuple[Vector, Vector]:
    """The parts normal to and within the span of a basis; they add up to the vector."""
    normal = _without(_without(vector, basis), basis)
    return normal, vector - normal


def _without(vector: Vector, basis: Basis) -> Vector:
    return vector - (basis @ vector) @ basis


# Updates


def disentangled(
    forget: Vector, retain: Vector, basis: Basis, gamma: float = 1.0, alpha: float = 1.0
) -> Vector:
    """Pure GU: gamma * normal part of the forget gradient + alpha * retain gradient, all whitened.

    The retain gradient is added whole: it lies in the span, and lowers the retain loss.
    """
    return gamma * decompose(forget, basis)[0] + alpha * retain


def jointly_disentangled(
    forget: Vector,
    retain: Vector,
    basis: Basis,
    gamma: float = 1.0,
    beta_rep: float = 1.0,
    tau: float = 0.0,
    kappa: float = 0.0,
) -> Vector:
    """The paper's joint variant: tangential components that help both losses are kept as well.

    gamma * (normal + s * kept) + beta_rep * retain within the span. A component along a basis vector is kept
    where its product with that of the retain gradient exceeds tau; s = min(1, kappa |normal| / |kept|). So
    the result depends on the basis, not on its span alone: where the current retain gradient comes first, all
    others are normal to it, and only the component along the first can be kept. Components of the retain
    gradient that are rounding noise (1e-5 of its length) count as zero, or their signs would decide.

    Args:
        forget: Whitened.
        retain: Whitened.
        basis: Of the protected span.
        gamma: Weight of the forget part.
        beta_rep: Weight of the retain part; the alpha of `disentangled`.
        tau: At least 0.
        kappa: Largest length of the kept part, in lengths of the normal part; 0 keeps nothing: pure GU.

    Raises:
        InvalidHyperparameter: If tau or kappa is negative.
    """
    check_range("tau", tau, 0, float("inf"))
    check_range("kappa", kappa, 0, float("inf"))
    normal, _ = decompose(forget, basis)
    a, b = basis @ forget, basis @ retain
    b = torch.where(b.abs() > _NOISE * retain.norm(), b, 0.0)
    kept = torch.where(a * b > tau, a, 0.0) @ basis
    size = kept.norm()
    share = torch.where(size > 0, (kappa * normal.norm() / size).clamp(max=1.0), 0.0)
    return gamma * (normal + share * kept) + beta_rep * (b @ basis)


@dataclass(frozen=True)
class Surgery:
    """A gradient after projection on one other.

    Attributes:
        projected: forget - coefficient * retain.
        coefficient: One for all parameters.
        conflict: Whether the two gradients point against each other.
    """

    projected: Vector
    coefficient: float
    conflict: bool


def project_out(forget: Vector, retain: Vector, eps: float = 1e-12) -> Surgery:
    """GU of rank one in closed form: forget - <forget, retain> / max(|retain|^2, eps) * retain."""
    return _surgery(forget, retain, eps, only_in_conflict=False)


def pcgrad(forget: Vector, retain: Vector, eps: float = 1e-12) -> Surgery:
    """The same, but only where the gradients conflict (Yu et al. 2020, arXiv 2001.06782)."""
    return _surgery(forget, retain, eps, only_in_conflict=True)


def _surgery(forget: Vector, retain: Vector, eps: float, only_in_conflict: bool) -> Surgery:
    if forget.shape != retain.shape:
        raise ModelMismatch(
            f"Gradients of {tuple(forget.shape)} and {tuple(retain.shape)} parameters do not compare."
        )
    product = float(forget @ retain)
    conflict = product < 0
    coefficient = product / max(float(retain @ retain), eps) if conflict or not only_in_conflict else 0.0
    return Surgery(forget - coefficient * retain if coefficient else forget, coefficient, conflict)


def project_block(
    gradient: Float[Tensor, "*shape"], directions: Sequence[Float[Tensor, "*shape"]], align: float = 1.0
) -> Float[Tensor, "*shape"]:
    """One parameter tensor without its components along several directions, removed one after the other.

    The published projector, block by block: stricter than the condition on all parameters together, and
    dependent on the order where the directions are not orthogonal. Kept to compare with; use `decompose`.

    Args:
        gradient: Of one tensor.
        directions: Retain directions of the same shape; zero ones are skipped.
        align: Share of every component that is removed.
    """
    for direction in directions:
        square = (direction * direction).sum()
        if square > 0:
            gradient = gradient - align * (gradient * direction).sum() / square * direction
    return gradient


# What to log


@dataclass(frozen=True)
class Entanglement:
    """How far the forget gradient is entangled with the retained ones, in the metric.

    Attributes:
        cosine: Between forget and retain gradient; NaN if one is zero.
        share: Of the squared length of the forget gradient, within the protected span.
        uncovered: Share of the length of the retain gradient outside the span; 0 if it is protected.
    """

    cosine: float
    share: float
    uncovered: float


def entanglement(forget: Vector, retain: Vector, basis: Basis) -> Entanglement:
    """Diagnostics of one step, of whitened gradients."""
    sizes = float(forget.norm()), float(retain.norm())
    cosine = float(forget @ retain) / (sizes[0] * sizes[1]) if sizes[0] * sizes[1] else float("nan")
    within, outside = decompose(forget, basis)[1], decompose(retain, basis)[0]
    return Entanglement(
        cosine=cosine,
        share=float((within.norm() / sizes[0]) ** 2) if sizes[0] else 0.0,
        uncovered=float(outside.norm()) / sizes[1] if sizes[1] else 0.0,
    )
