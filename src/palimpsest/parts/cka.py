"""Centred kernel alignment (CKA): how similar two representations of the same records are."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.core.errors import InvalidAudit

FEWEST_ROWS = 3
"""Centred, two rows are one number up to sign: their CKA is 1 whatever they hold."""
SAME_ROW = 1e-12
"""Rows are equal if their squared distance is no more than this share of the largest squared length."""
Features = Float[Tensor, "rows dim"]
Gram = Float[Tensor, "rows rows"]


def linear_cka(x: Features, y: Features, debiased: bool = False) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414), in [0, 1].

    The feature-space form |Y'X|^2 / (|X'X| |Y'Y|) of centred features is used where it is cheaper than
    Gram matrices; both give the same. Rows must be the same records in the same order.

    Args:
        x: Representations of one model.
        y: Of another; the width may differ.
        debiased: Use the unbiased estimator of HSIC (Song et al. 2012), which does not rise with the
            width; it may be slightly negative, and needs 4 rows.

    Raises:
        InvalidAudit: For unequal or too few rows, NaN or Inf, or features that are all alike.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
        >>> round(linear_cka(x, 5 * x + 1), 6)
        1.0
    """
    a, b = _centred(x, y)
    if debiased or max(a.shape[1], b.shape[1]) > len(a):
        return alignment(a @ a.T, b @ b.T, debiased)
    cross = float((b.T @ a).square().sum())
    return cross / float((a.T @ a).norm() * (b.T @ b).norm())


def linear_hsic(x: Features, y: Features) -> float:
    """Sum of the entrywise product of the centred linear Gram matrices (no factor of the rows)."""
    a, b = _centred(x, y)
    return float(((a @ a.T) * (b @ b.T)).sum())


def rbf_cka(x: Features, y: Features, debiased: bool = False) -> float:
    """CKA with Gaussian kernels exp(-d^2 / 2s^2), s^2 the lower median of its own non-zero d^2.

    Raises:
        InvalidAudit: As `linear_cka`.
    """
    kernels: list[Gram] = []
    for features in _centred(x, y):
        squares = features.square().sum(1)
        distances = (squares[:, None] + squares - 2 * features @ features.T).fill_diagonal_(0)
        # What is left of the distance between equal rows is rounding, and would count as a small one.
        distances[distances <= SAME_ROW * squares.max()] = 0
        scale = distances[distances > 0].median()
        kernels.append(_centred_kernel((-0.5 * distances / scale).exp()))
    return alignment(kernels[0], kernels[1], debiased)


def check_rows(x: Features, y: Features) -> None:
    """Check that two sets of features have the same number of rows, and enough.

    Raises:
        InvalidAudit: If not.
    """
    if len(x) != len(y):
        raise InvalidAudit(f"CKA compares the same records: there are {len(x)} and {len(y)} rows.")
    if len(x) < FEWEST_ROWS:
        raise InvalidAudit(f"CKA needs at least {FEWEST_ROWS} rows, got {len(x)}.")


def _centred(x: Features, y: Features) -> tuple[Features, Features]:
    check_rows(x, y)
    pair: list[Features] = []
    for features in (x.double(), y.double()):
        if not torch.isfinite(features).all():
            raise InvalidAudit("The features hold NaN or Inf.")
        centred = features - features.mean(0)
        # What float32 leaves of a feature that is the same for all is rounding, not variation.
        if (centred.abs().amax(0) <= 1e-7 * features.abs().amax(0)).all():
            raise InvalidAudit("The features are the same for all records: nothing can be compared.")
        pair.append(centred)
    return pair[0], pair[1]


def _centred_kernel(kernel: Gram) -> Gram:
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def alignment(k: Gram, l: Gram, debiased: bool = False) -> float:  # noqa: E741
    """CKA of two Gram matrices, centred ones unless `debiased`.

    Raises:
        InvalidAudit: If the unbiased estimator is not defined.
    """
    if not debiased:
        return float((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt())
    cross, own_k, own_l = (float(_unbiased_hsic(*pair)) for pair in ((k, l), (k, k), (l, l)))
    if own_k <= 0 or own_l <= 0:
        raise InvalidAudit(f"Debiased CKA is not defined: {len(k)} rows are too few for these features.")
    return cross / math.sqrt(own_k * own_l)


def _unbiased_hsic(k: Gram, l: Gram) -> Tensor:  # noqa: E741
    n = len(k)
    if n < 4:
        raise InvalidAudit(f"Debiased CKA needs at least 4 rows, got {n}.")
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    product = (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2))
    return (product - 2 / (n - 2) * (k.sum(0) @ l.sum(0))) / (n * (n - 3))
