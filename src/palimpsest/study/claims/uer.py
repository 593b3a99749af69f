"""Measurements for the claims of unbiased experience replay."""

from __future__ import annotations

import torch
from torch import Tensor

from palimpsest.core.records import Batch
from palimpsest.retain.cosine import (
    class_vectors,
    cosine_cross_entropy,
    cosine_logits,
    product_cross_entropy,
    product_logits,
    read_out,
    unit,
)
from palimpsest.retain.running import Run
from palimpsest.study.claims.learned import Learned, learned_measurement


@learned_measurement("uer.angle-lengthens")
def angle_lengthens(learned: Learned) -> float:
    """Largest |<gradient, vector>| / |gradient| |vector| over features and class vectors, of the new records' loss."""
    features, vectors, labels = _two(learned.finished)
    return _along(cosine_cross_entropy(features, vectors, labels, 0.09), features, vectors)


@learned_measurement("uer.product-lengthens")
def product_lengthens(learned: Learned) -> float:
    """The same of the replayed records' loss."""
    features, vectors, labels = _two(learned.finished)
    return _along(product_cross_entropy(features, vectors, labels), features, vectors)


@learned_measurement("uer.old-over-new-length")
def old_over_new_length(learned: Learned) -> float:
    """Mean length of the class vectors of earlier tasks over that of the newest task."""
    run = learned.finished
    lengths = class_vectors(run.learner.student).detach().norm(dim=1)
    newest = torch.zeros(len(lengths), dtype=torch.bool)
    newest[list(run.stream[-1].classes)] = True
    return float(lengths[~newest].mean() / lengths[newest].mean())


@learned_measurement("uer.product-over-cosine")
def product_over_cosine(learned: Learned) -> float:
    """Accuracy over all classes when answers are given by products, minus that by cosines, of one model."""
    student = learned.finished.learner.student
    batch = _tested(learned.finished)
    right = [
        (read_out(student, batch, score) == batch["label"]).double().mean()
        for score in (product_logits, cosine_logits)
    ]
    return float(right[0] - right[1])


@learned_measurement("uer.decomposition-error")
def decomposition_error(learned: Learned) -> float:
    """Largest gap between |h| |w| cos(h, w) and <h, w>, over the largest |<h, w>|."""
    features, vectors, _ = _two(learned.finished)
    features, vectors = features.detach(), vectors.detach()
    lengths = features.norm(dim=1)[:, None] * vectors.norm(dim=1)
    product = product_logits(features, vectors)
    return float((lengths * (unit(features) @ unit(vectors).T) - product).abs().max() / product.abs().max())


def _tested(run: Run) -> Batch:
    """Inputs and labels of all tests."""
    tests = [experience.test.tensors for experience in run.stream]
    fields = ("input", "label")
    place = run.runtime.torch_device
    return {name: torch.cat([test[name] for test in tests if test]).to(place) for name in fields}


def _two(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the tests, class vectors and labels, in double precision, as leaves of a graph."""
    batch = _tested(run)
    features = run.learner.student.features(batch).detach().double().requires_grad_()
    vectors = class_vectors(run.learner.student).detach().double().requires_grad_()
    return features, vectors, batch["label"]


def _along(loss: Tensor, features: Tensor, vectors: Tensor) -> float:
    """Largest |cosine| between a row and its gradient."""
    found = [
        ((gradient * rows).sum(1).abs() / (gradient.norm(dim=1) * rows.norm(dim=1)).clamp_min(1e-30)).max()
        for rows, gradient in zip(
            (features, vectors), torch.autograd.grad(loss, [features, vectors]), strict=True
        )
    ]
    return float(max(found))
