"""RMU: steer hidden states on forget text to a fixed random direction, hold them on retained text.

Li et al. 2024, "The WMDP Benchmark", arXiv 2403.03218. The pure parts; states come from hooks.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch
from palimpsest.core.unlearner import check_range

States = Float[Tensor, "batch tokens dim"]
StateReduction = Literal["sequence", "token", "released"]


def control_vector(draw: Float[Tensor, " dim"], coefficient: float) -> Float[Tensor, " dim"]:
    """Where the states are steered: coefficient * u / ||u||.

    Args:
        draw: u, from U(0, 1) in every coordinate, drawn once per topic. All positive, as in the published
            code: not an isotropic direction.
        coefficient: Length of the vector, above 0. Choose a few times the usual length of the states.

    Raises:
        InvalidHyperparameter: If the coefficient is not above 0, or the draw is zero.
    """
    check_range("coefficient", coefficient, 0, float("inf"), open_low=True)
    norm = draw.norm()
    if not norm > 0:
        raise InvalidHyperparameter("The direction of a control vector is zero or NaN: draw again.")
    return coefficient * draw / norm


def draw_control_vector(
    dim: int, coefficient: float, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Float[Tensor, " dim"]:
    """A control vector in a random direction of the positive orthant; drawn on the generator's device."""
    draw = torch.rand(dim, generator=generator, device=generator.device)
    return control_vector(draw, coefficient).to(device)


def state_distance(
    states: States,
    target: Float[Tensor, "#batch #tokens dim"] | Float[Tensor, " dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    reduction: StateReduction = "sequence",
) -> Float[Tensor, ""]:
    """Mean squared distance of hidden states to a target, also averaged over coordinates.

    The forget term of RMU with a control vector as target, its retain term with the frozen model's states.

    Args:
        states: Of the model that is trained.
        target: Detached: it does not learn.
        mask: Tokens that count; all without it (WMDP's own code counts padding as well).
        reduction: "sequence": mean over the tokens of a row, then over rows. "token": over all tokens at
            once. "released": open-unlearning's division of [batch] by [batch, 1], which gives (mean over rows
            of the summed distance) * (mean over rows of 1 / tokens); the same only for equal lengths.

    Raises:
        ModelMismatch: If shapes do not fit.
        InvalidRecords: If no token of a row counts (of any row, for "token").
        InvalidHyperparameter: If the reduction is unknown.
    """
    if reduction not in ("sequence", "token", "released"):
        raise InvalidHyperparameter(
            f"reduction must be 'sequence', 'token' or 'released', not {reduction!r}."
        )
    try:
        target = target.detach().expand_as(states)
    except RuntimeError:
        raise ModelMismatch(
            f"States {tuple(states.shape)} cannot be compared with a target {tuple(target.shape)}."
        ) from None
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if mask.dtype != torch.bool or mask.shape != states.shape[:2]:
        raise ModelMismatch(
            f"The mask must be boolean of shape {tuple(states.shape[:2])}, not {mask.dtype} of {tuple(mask.shape)}."
        )
    counts = mask.sum(1)
    short = counts.sum() == 0 if reduction == "token" else (counts == 0).any()
    if bool(short):
        rows = torch.nonzero(counts == 0).flatten().tolist()
        raise InvalidRecords(f"No token counts in rows {rows}: their hidden states cannot be steered.")
    distances = ((states - target) ** 2).mean(-1).masked_fill(~mask, 0.0).sum(1)
    if reduction == "sequence":
        return (distances / counts).mean()
    if reduction == "token":
        return distances.sum() / counts.sum()
    return distances.mean() * (1 / counts).mean()
