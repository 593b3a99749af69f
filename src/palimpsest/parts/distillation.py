"""Distances between the outputs of two models: KL, squared features, Jensen-Shannon, with explicit reduction."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.unlearner import check_range

Reduction = Literal["batchmean", "mean", "none"]
"""How rows become one number.

"batchmean" divides the sum by the number of rows (the divergence as defined, averaged over records);
"mean" divides it by rows x columns, so it is smaller by the number of classes or features; "none" gives one
value per row. Published losses differ in this, and with plain SGD it scales the learning rate.
"""


def kl_divergence(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    square_temperature: bool = False,
    mask: Bool[Tensor, "*rows"] | None = None,
) -> Float[Tensor, "*rows"]:
    """KL(teacher || student), in nats: sum over classes of p_t log(p_t / p_s), p = softmax(logits / T).

    A logit of -inf takes a class out: where the teacher gives no probability, the class adds nothing and
    has a zero gradient; where only the student does, the divergence is +inf. Setting columns of both to
    -inf thus compares the remaining classes.

    Args:
        student_logits: Being trained.
        teacher_logits: To be matched; detach them where the teacher must not learn.
        temperature: T, above 0.
        reduction: See `Reduction`.
        square_temperature: Multiply by T squared, so that gradients keep their size as T grows
            (Hinton et al. 2015, arXiv 1503.02531).
        mask: Rows that count; the others neither add to the sum nor to the number of rows. Without any
            row that counts the result is 0.

    Raises:
        InvalidHyperparameter: If T is not above 0 or the reduction is unknown.
        ModelMismatch: If shapes differ.

    Example:
        >>> teacher, student = torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.9, 0.1]]))
        >>> round(kl_divergence(student, teacher).item(), 4)  # 0.5 log(0.5 / 0.9) + 0.5 log(0.5 / 0.1)
        0.5108
    """
    check_range("temperature", temperature, 0, float("inf"), open_low=True)
    student, teacher = _counted(student_logits, teacher_logits, mask)
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    probability = log_teacher.exp()
    log_ratio = torch.where(probability > 0, log_teacher - log_student, 0.0)
    divergence = (probability * log_ratio).sum(-1)
    if square_temperature:
        divergence = divergence * temperature**2
    return _reduced(divergence, student.shape[-1], reduction, mask)


def feature_distance(
    student: Float[Tensor, "*rows dim"],
    teacher: Float[Tensor, "*rows dim"],
    reduction: Reduction = "mean",
    normalise: bool = False,
    mask: Bool[Tensor, "*rows"] | None = None,
) -> Float[Tensor, "*rows"]:
    """Squared Euclidean distance of features (or logits); "mean" is the mean squared error.

    Args:
        student: Being trained.
        teacher: To be matched.
        reduction: See `Reduction`.
        normalise: Compare directions only: rows are scaled to length 1, so that the distance of a row is
            2 - 2 cos.
        mask: Rows that count.

    Raises:
        InvalidHyperparameter: If the reduction is unknown.
        ModelMismatch: If shapes differ.
    """
    student, teacher = _counted(student, teacher, mask)
    if normalise:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return _reduced(((student - teacher) ** 2).sum(-1), student.shape[-1], reduction, mask)


def js_divergence(
    probabilities: Float[Tensor, "*rows classes"],
    reference: Float[Tensor, "*rows classes"],
    reduction: Reduction = "batchmean",
    from_mixture: bool = False,
    mask: Bool[Tensor, "*rows"] | None = None,
) -> Float[Tensor, "*rows"]:
    """Jensen-Shannon divergence, in nats: (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2.

    Symmetric, and between 0 and log 2 per row.

    Args:
        probabilities: p, rows that sum to 1.
        reference: q.
        reduction: See `Reduction`.
        from_mixture: Average KL(m || p) and KL(m || q) instead, as published ZRF code does: the same to
            second order, but unbounded (+inf where one of p and q alone is 0).
        mask: Rows that count.

    Raises:
        InvalidHyperparameter: If the reduction is unknown.
        ModelMismatch: If shapes differ.

    Example:
        >>> apart = js_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        >>> round(apart.item(), 4)
        0.6931
    """
    p, q = _counted(probabilities, reference, mask)
    m = (p + q) / 2
    pairs = ((m, p), (m, q)) if from_mixture else ((p, m), (q, m))
    divergence = sum((_relative_entropy(a, b) for a, b in pairs), torch.zeros_like(m[..., 0])) / 2
    return _reduced(divergence, p.shape[-1], reduction, mask)


def _relative_entropy(p: Float[Tensor, "*rows classes"], q: Float[Tensor, "*rows classes"]) -> Tensor:
    """Sum of p log(p / q); classes with p = 0 add nothing and have a zero gradient."""
    inside = p > 0
    ratio = torch.where(inside, p, 1.0) / torch.where(inside, q, 1.0)
    return (p * ratio.log()).sum(-1)


def _counted(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows that count. Selecting them first keeps NaN and Inf of the others out of the gradient."""
    if student.shape != teacher.shape or student.dim() < 1:
        raise ModelMismatch(
            f"Outputs of shape {tuple(student.shape)} cannot be compared with outputs of shape "
            f"{tuple(teacher.shape)}: both models must give the same."
        )
    if mask is None:
        return student, teacher
    if mask.dtype != torch.bool or mask.shape != student.shape[:-1]:
        raise ModelMismatch(
            f"A mask of rows must be boolean of shape {tuple(student.shape[:-1])}, "
            f"not {mask.dtype} of shape {tuple(mask.shape)}."
        )
    return student[mask], teacher[mask]


def _reduced(rows: Tensor, columns: int, reduction: Reduction, mask: Tensor | None) -> Tensor:
    if reduction == "batchmean":
        return rows.sum() / max(rows.numel(), 1)
    if reduction == "mean":
        return rows.sum() / max(rows.numel() * columns, 1)
    if reduction != "none":
        raise InvalidHyperparameter(f"reduction must be 'batchmean', 'mean' or 'none', not {reduction!r}.")
    return rows if mask is None else rows.new_zeros(mask.shape).index_put((mask,), rows)
