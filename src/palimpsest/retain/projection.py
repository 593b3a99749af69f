"""Gradients that do not hurt what was learned: the projections of A-GEM and GEM."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import lsq_linear
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter


def project_out(
    gradient: Float[Tensor, " parameters"], reference: Float[Tensor, " parameters"]
) -> Float[Tensor, " parameters"]:
    """A-GEM (arXiv 1812.00420, eq. 11): g - (g.r / r.r) r if g.r < 0, else g; a zero r changes nothing.

    Example:
        >>> project_out(torch.tensor([1.0, -1.0]), torch.tensor([0.0, 1.0])).tolist()
        [1.0, 0.0]
    """
    inner = gradient @ reference
    return gradient - inner / (reference @ reference) * reference if inner < 0 else gradient


def project_into_cone(
    gradient: Float[Tensor, " parameters"],
    references: Float[Tensor, "tasks parameters"],
    margin: float = 0.5,
    ridge: float = 1e-3,
) -> Float[Tensor, " parameters"]:
    """GEM (arXiv 1706.08840, eq. 11): the nearest gradient that raises the loss of no earlier task.

    v = argmin 1/2 v' (G G' + ridge I) v + (G g)' v over v >= margin; the result is g + G' v. Without a
    negative product G g the gradient is left as it is.

    Raises:
        InvalidHyperparameter: If the margin is negative.
    """
    if margin < 0:
        raise InvalidHyperparameter(f"The margin must be at least 0, not {margin}.")
    products = (references @ gradient).double().cpu().numpy()
    if not (products < 0).any():
        return gradient
    gram = (references @ references.T).double().cpu().numpy()
    # with P = L L' the problem is the bounded least squares min |L' v + L^-1 q|^2
    lower = np.linalg.cholesky(gram + ridge * np.eye(len(gram)))
    found = lsq_linear(lower.T, -np.linalg.solve(lower, products), (margin, np.inf), method="bvls", tol=1e-12)
    weights = torch.from_numpy(found.x).to(gradient)
    return gradient + references.T @ weights


def flat_gradient(parameters: Sequence[nn.Parameter]) -> Float[Tensor, " parameters"]:
    """The `grad` fields as one vector, zero where there is none."""
    return torch.cat([
        (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
        for parameter in parameters
    ]).clone()  # fmt: skip


def set_gradient(parameters: Sequence[nn.Parameter], gradient: Float[Tensor, " parameters"]) -> None:
    """Put a vector into the `grad` fields."""
    start = 0
    for parameter in parameters:
        parameter.grad = gradient[start : start + parameter.numel()].view_as(parameter).clone()
        start += parameter.numel()


@contextmanager
def statistics_kept(model: nn.Module) -> Generator[None]:
    """Batch-norm statistics as they were, after passes in training mode that should not move them."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
