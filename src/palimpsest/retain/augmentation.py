"""Augmentation: other views of a batch of images, drawn per record on the batch's own device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch

Augmentation = Literal["none", "flip", "crop", "crop-flip", "noise", "jitter"]
AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)
Images = Float[Tensor, "batch channels height width"]


def view(inputs: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """One random view of every input; "none" gives the inputs themselves.

    Args:
        inputs: Images [batch, channels, height, width]; anything for "none" and "noise".
        augmentation: "flip" mirrors half of them, "crop" shifts each by up to an eighth of its side (zeros
            come in), "crop-flip" both, "noise" adds Gaussian noise of deviation 0.1, "jitter" shifts, turns by
            up to 10 degrees and scales by up to a tenth.
        generator: On the CPU.

    Raises:
        InvalidHyperparameter: For an unknown name.
        ModelMismatch: If inputs are no images where images are needed.
    """
    if augmentation == "none":
        return inputs
    if augmentation == "noise":
        return inputs + 0.1 * torch.randn(inputs.shape, generator=generator).to(inputs)
    if augmentation not in VIEWS:
        raise InvalidHyperparameter(
            f"The augmentation must be one of {', '.join(AUGMENTATIONS)}, not {augmentation!r}."
        )
    if inputs.dim() != 4:
        raise ModelMismatch(
            f"'{augmentation}' needs images [batch, channels, height, width], not {tuple(inputs.shape)}."
        )
    return VIEWS[augmentation](inputs, generator)


def flip(images: Images, generator: torch.Generator) -> Images:
    """Each image mirrored left to right with probability 1/2."""
    turned = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(turned[:, None, None, None], images.flip(-1), images)


def crop(images: Images, generator: torch.Generator) -> Images:
    """Each image shifted by whole pixels, up to an eighth of its side (at least one), zeros coming in."""
    n, _, height, width = images.shape
    reach = [max(1, side // 8) for side in (height, width)]
    padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]))
    shift = [torch.randint(0, 2 * r + 1, (n,), generator=generator).to(images.device) for r in reach]
    rows = shift[0][:, None] + torch.arange(height, device=images.device)
    columns = shift[1][:, None] + torch.arange(width, device=images.device)
    item = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[item, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def jitter(images: Images, generator: torch.Generator) -> Images:
    """Each image turned by up to 10 degrees, scaled by up to a tenth and shifted by up to a tenth, bilinear."""
    n = len(images)
    angle = (2 * torch.rand(n, generator=generator) - 1) * torch.pi / 18
    scale = 0.9 + 0.2 * torch.rand(n, generator=generator)
    shift = 0.2 * (2 * torch.rand(n, 2, generator=generator) - 1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    matrix = torch.stack(rows, 1).to(images)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


VIEWS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "flip": flip,
    "crop": crop,
    "crop-flip": lambda images, generator: flip(crop(images, generator), generator),
    "jitter": jitter,
}
