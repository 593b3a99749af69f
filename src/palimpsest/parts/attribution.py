"""Integrated gradients: how much each part of an input adds to a score, along a path from a baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingDependency, ModelMismatch

Quadrature = Literal["published", "gausslegendre", "riemann_trapezoid", "riemann_middle"]
Score = Callable[..., Float[Tensor, " batch"]]


@dataclass(frozen=True)
class Attribution:
    """Shares of a score's rise from the baseline to the input.

    Attributes:
        values: Share of each entry of the input, [batch, ...].
        score_input: Score of the input, [batch].
        score_baseline: Score of the baseline, [batch].
    """

    values: Float[Tensor, "batch ..."]
    score_input: Float[Tensor, " batch"]
    score_baseline: Float[Tensor, " batch"]

    @property
    def completeness_error(self) -> Float[Tensor, " batch"]:
        """Sum of the shares minus the rise, which it equals on an infinitely fine path."""
        return self.values.flatten(1).sum(1) - (self.score_input - self.score_baseline)


def integrated_gradients(
    score: Score,
    inputs: Float[Tensor, "batch ..."],
    baselines: Float[Tensor, "batch ..."],
    *context: Tensor,
    steps: int = 32,
    quadrature: Quadrature = "gausslegendre",
) -> Attribution:
    """(x - x0) times the mean gradient of the score on the straight path from x0 to x.

    Args:
        score: From inputs [n, ...] and `context`, repeated alike, to one score each, [n].
        inputs: x.
        baselines: x0, of the same shape.
        *context: Tensors whose first axis is the batch, handed on to the score.
        steps: Points on the path.
        quadrature: How the mean is taken: by captum ("gausslegendre" is exact for smooth scores with few
            steps; "riemann_trapezoid", "riemann_middle"), or "published": the plain mean over evenly spaced
            points with both ends, which needs no captum and overweights the ends.

    Raises:
        MissingDependency: If captum is asked for and not installed.
        InvalidHyperparameter: For fewer than 2 steps.
    """
    if steps < 2:
        raise InvalidHyperparameter(f"Integrated gradients need at least 2 steps, not {steps}.")
    if quadrature == "published":
        mean = torch.zeros_like(inputs)
        for alpha in torch.linspace(0, 1, steps).tolist():
            point = (baselines + alpha * (inputs - baselines)).detach().requires_grad_()
            mean += torch.autograd.grad(score(point, *context).sum(), point)[0] / steps
        values = (inputs - baselines) * mean
    else:
        method = captum_attr().IntegratedGradients(score)
        values = method.attribute(
            inputs, baselines, additional_forward_args=context or None, n_steps=steps, method=quadrature
        )
    with torch.no_grad():
        return Attribution(values.detach(), score(inputs, *context), score(baselines, *context))


def captum_attr() -> Any:
    """The module of attribution methods of captum.

    Raises:
        MissingDependency: If captum is not installed.
    """
    try:
        import captum.attr
    except ImportError as missing:
        raise MissingDependency("captum", "concepts") from missing
    return captum.attr


def class_activation_maps(
    logits: Callable[[Tensor], Tensor], layer: nn.Module, images: Tensor, label: int
) -> Float[Tensor, "batch rows columns 1"]:
    """Grad-CAM of a class at a convolution, by captum.

    Raises:
        MissingDependency: If captum is not installed.
        ModelMismatch: If the layer's output is no feature map.
    """
    maps = captum_attr().LayerGradCam(logits, layer).attribute(images, label, relu_attributions=True)
    if maps.dim() != 4:
        raise ModelMismatch(f"Grad-CAM needs a layer with feature maps; its output is {tuple(maps.shape)}.")
    return maps.detach().movedim(1, -1)
