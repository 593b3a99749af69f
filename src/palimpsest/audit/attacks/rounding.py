"""Rounding weights to few bits, simulated in floating point."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.audit.attacks.weights import hidden_weights
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.task import Task

NF4_LEVELS = (
    -1.0,
    -0.6962,
    -0.5251,
    -0.3949,
    -0.2844,
    -0.1848,
    -0.0911,
    0.0,
    0.0796,
    0.1609,
    0.2461,
    0.3379,
    0.4407,
    0.5626,
    0.7230,
    1.0,
)
"""Quantiles of the normal distribution (QLoRA, arXiv 2305.14314), to four digits."""
NF4_BLOCK = 64

Step = Literal["symmetric", "paper"]


def codes(
    weight: Float[Tensor, "rows ..."], bits: int, step: Step = "symmetric"
) -> Int[Tensor, "rows columns"]:
    """Integer codes clip(round(w / D), -2^(b-1), 2^(b-1) - 1), one step size D per output row.

    With m the largest magnitude of the row, D is m / (2^(b-1) - 1) ("symmetric": m is itself a code) or
    m / 2^(b-1) ("paper": as arXiv 2410.16454 states it, which cuts a positive m to the code below).
    Rounding is to the nearest, halves to even. A row of zeros has codes 0.

    Raises:
        InvalidHyperparameter: For bits outside 2 to 8.

    Example:
        >>> codes(torch.tensor([[0.0, 0.3, -0.7]]), bits=4).tolist()
        [[0, 3, -7]]
    """
    flat = weight.flatten(1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return (flat / _step_size(flat, bits, step)).round().clamp(low, high).to(torch.int64)


def quantize(
    weight: Float[Tensor, "rows ..."], bits: int, step: Step = "symmetric"
) -> Float[Tensor, "rows ..."]:
    """Weights at their codes, D * code, in the shape and type of the input."""
    size = _step_size(weight.flatten(1), bits, step)
    return (codes(weight, bits, step) * size).to(weight.dtype).view(weight.shape)


def quantize_nf4(weight: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
    """Weights in NormalFloat: blocks of 64 scaled by their largest magnitude, nearest of 16 levels.

    Blocks run through the flattened weight, as in the published format; the last may be shorter.
    """
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    scaled = blocks / torch.where(largest > 0, largest, torch.ones_like(largest))
    levels = torch.tensor(NF4_LEVELS, dtype=flat.dtype, device=flat.device)
    nearest = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * largest).flatten()[: len(flat)].view(weight.shape)


@torch.no_grad()
def quantize_model(
    model: nn.Module, task: Task, bits: int, step: Step = "symmetric", nf4: bool = False
) -> None:
    """Round all linear and convolution weights below the head, in place.

    Args:
        model: A copy that may be changed.
        task: Knows the head, if the user named one.
        bits: Per weight; not used with `nf4`.
        step: Convention of the step size.
        nf4: Round to NormalFloat instead.
    """
    for parameter in hidden_weights(model, task).values():
        parameter.copy_(quantize_nf4(parameter) if nf4 else quantize(parameter, bits, step))


def check_bits(*bits: int) -> None:
    """Check that bits are whole numbers from 2 to 8.

    Raises:
        InvalidHyperparameter: If not.
    """
    for value in bits:
        if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
            raise InvalidHyperparameter(f"bits must be whole numbers from 2 to 8, not {value!r}.")


def _step_size(flat: Float[Tensor, "rows columns"], bits: int, step: Step) -> Float[Tensor, "rows 1"]:
    check_bits(bits)
    size = flat.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - (1 if step == "symmetric" else 0))
    return torch.where(size > 0, size, torch.ones_like(size))
