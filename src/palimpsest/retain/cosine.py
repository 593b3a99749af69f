"""Cosine heads: the rows of the output layer read as class vectors, without its bias.

A logit <h, w> is |h| |w| cos(h, w). Methods read either factor: the angle alone, or the whole product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch
from palimpsest.retain.heads import head_of, masked
from palimpsest.retain.student import Student

SMALLEST = 1e-6
"""Added to lengths before something is divided by them."""


def unit(vectors: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """V / (|v| + 1e-6), row by row: length 1, and 0 for a vector of length 0."""
    return vectors / (vectors.norm(dim=1, keepdim=True) + SMALLEST)


def cosine_logits(
    features: Float[Tensor, "batch dim"], vectors: Float[Tensor, "classes dim"], temperature: float = 1.0
) -> Float[Tensor, "batch classes"]:
    """cos(feature, class vector) / temperature."""
    return unit(features) @ unit(vectors).T / temperature


def product_logits(
    features: Float[Tensor, "batch dim"], vectors: Float[Tensor, "classes dim"]
) -> Float[Tensor, "batch classes"]:
    """<feature, class vector>: lengths and angle."""
    return features @ vectors.T


def class_vectors(student: Student) -> Float[Tensor, "classes dim"]:
    """Weights of the student's output layer, one row per class, that train with it."""
    return cast(Tensor, head_of(student.model, getattr(student.task, "head", None)).weight)


def has_bias(student: Student) -> bool:
    """Whether the output layer has a bias."""
    return getattr(head_of(student.model, getattr(student.task, "head", None)), "bias", None) is not None


@torch.no_grad()
def read_out(
    student: Student, batch: Batch, score: Callable[[Tensor, Tensor], Tensor]
) -> Int[Tensor, " batch"]:
    """The allowed class of largest score, from features and class vectors in evaluation mode."""
    allowed = student.allowed(batch)
    with evaluating(student.model):
        features = student.features(batch)
    return masked(score(features, class_vectors(student)), allowed).argmax(1)


def check_labels(labels: Int[Tensor, " batch"], classes: int) -> None:
    """Check that class vectors exist for all labels.

    Raises:
        ModelMismatch: Naming the first label that has none.
    """
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise ModelMismatch(f"Label {int(outside[0])} is outside the head of {classes} classes.")


def cosine_cross_entropy(
    features: Float[Tensor, "batch dim"],
    vectors: Float[Tensor, "classes dim"],
    labels: Int[Tensor, " batch"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Cross-entropy of cosines over a temperature: its gradient turns vectors and leaves their length."""
    check_labels(labels, len(vectors))
    return F.cross_entropy(cosine_logits(features, vectors, temperature), labels)


def product_cross_entropy(
    features: Float[Tensor, "batch dim"],
    vectors: Float[Tensor, "classes dim"],
    labels: Int[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Cross-entropy of products: its gradient changes lengths too."""
    check_labels(labels, len(vectors))
    return F.cross_entropy(product_logits(features, vectors), labels)
