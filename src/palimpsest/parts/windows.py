"""Windows of images and of token sequences: find the one that shows a concept, cut it, paste it elsewhere.

Everything works on planes [batch, channels, height, width]; a token sequence is a plane of height 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter

Size = tuple[int, int]
View = Literal["enlarged", "alone"]
AT_ONCE = 1024
"""At most about this many windows lie in memory, each as large as the input."""


@dataclass(frozen=True)
class Grid:
    """A window of `size` (height, width) that moves by `stride` (down, right)."""

    size: Size
    stride: Size

    def centers(self, rows: Int[Tensor, " batch"], columns: Int[Tensor, " batch"]) -> Int[Tensor, "batch 2"]:
        """Middle (x, y) of windows in pixels."""
        x = columns * self.stride[1] + self.size[1] // 2
        return torch.stack([x, rows * self.stride[0] + self.size[0] // 2], 1)


def check_window(size: Size, plane: Size) -> None:
    """Check that a window fits.

    Raises:
        InvalidHyperparameter: If it is empty, or larger than the plane.
    """
    if min(size) < 1 or size[0] > plane[0] or size[1] > plane[1]:
        raise InvalidHyperparameter(
            f"A patch of {size[0]} x {size[1]} does not fit an input of {plane[0]} x {plane[1]}."
        )


def as_planes(inputs: Tensor) -> Shaped[Tensor, "batch channels height width"]:
    """Images as they are, token sequences [batch, tokens] as planes of height 1."""
    return inputs[:, None, None, :] if inputs.dim() == 2 else inputs


def cut(
    planes: Shaped[Tensor, "batch channels height width"], centers: Int[Tensor, "batch 2"], size: Size
) -> Shaped[Tensor, "batch channels rows columns"]:
    """One window per plane around (x, y), moved (not cut short) to lie inside."""
    batch, rows, columns = _places(planes, centers, size)
    return planes[batch, :, rows, columns].movedim(-1, 1)


def paste(
    planes: Shaped[Tensor, "batch channels height width"],
    patches: Shaped[Tensor, "batch channels rows columns"],
    centers: Int[Tensor, "batch 2"],
) -> Shaped[Tensor, "batch channels height width"]:
    """Copies of the planes with a patch each around (x, y), moved (not cut short) to lie inside."""
    batch, rows, columns = _places(planes, centers, (patches.shape[2], patches.shape[3]))
    result = planes.clone()
    result[batch, :, rows, columns] = patches.movedim(1, -1)
    return result


def _places(planes: Tensor, centers: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Index of every pixel of every window, each broadcastable to [batch, rows, columns]."""
    check_window(size, (planes.shape[2], planes.shape[3]))
    centers = centers.to(planes.device)
    left = (centers[:, 0] - size[1] // 2).clamp(0, planes.shape[3] - size[1])
    top = (centers[:, 1] - size[0] // 2).clamp(0, planes.shape[2] - size[0])
    rows = top[:, None, None] + torch.arange(size[0], device=planes.device)[:, None]
    columns = left[:, None, None] + torch.arange(size[1], device=planes.device)
    return torch.arange(len(planes), device=planes.device)[:, None, None], rows, columns


def peaks(
    maps: Float[Tensor, "batch rows columns concepts"], grid: Grid
) -> tuple[Int[Tensor, "batch 2"], Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Of each map the middle (x, y) of its highest window, the concept that is highest there, and how high."""
    _, _, columns, concepts = maps.shape
    value, place = maps.flatten(1).max(1)
    cell = place // concepts
    return grid.centers(cell // columns, cell % columns), place % concepts, value


def similarity_maps(
    planes: Shaped[Tensor, "batch channels height width"],
    embed: Callable[[Tensor], Float[Tensor, "windows dim"]],
    directions: Float[Tensor, "concepts dim"],
    grid: Grid,
    view: View = "enlarged",
    background: float = 0.0,
) -> Float[Tensor, "batch rows columns concepts"]:
    """Cosine between what each window shows and each concept.

    Args:
        planes: Images or token sequences.
        embed: Of planes as large as these.
        directions: Of the concepts, each of length 1.
        grid: Where the windows lie.
        view: How a window is shown to `embed`: "enlarged" to the size of the whole plane, or "alone" in its
            own place with `background` around it (the only way for tokens).
        background: See `view`. A window of nothing but this value is no candidate: it has minus infinity.
    """
    height, width = planes.shape[2:]
    check_window(grid.size, (height, width))
    cells = ((height - grid.size[0]) // grid.stride[0] + 1) * ((width - grid.size[1]) // grid.stride[1] + 1)
    together = max(1, AT_ONCE // cells)
    if len(planes) > together:
        parts = planes.split(together)
        return torch.cat([similarity_maps(part, embed, directions, grid, view, background) for part in parts])
    windows = planes.unfold(2, grid.size[0], grid.stride[0]).unfold(3, grid.size[1], grid.stride[1])
    batch, channels, rows, columns = windows.shape[:4]
    shown = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels, *grid.size)
    if view == "alone":
        cell = torch.arange(rows * columns, device=planes.device).repeat(batch)
        canvas = torch.full((len(shown), channels, height, width), background).to(planes)
        seen = paste(canvas, shown, grid.centers(cell // columns, cell % columns))
    else:
        seen = F.interpolate(shown.float(), (height, width), mode="bilinear", align_corners=False)
    features = embed(seen)
    cosines = F.normalize(features, dim=1) @ directions.to(features).T
    if view == "alone":
        cosines[(shown == background).flatten(1).all(1)] = -torch.inf
    return cosines.reshape(batch, rows, columns, -1)


def shrunk(
    images: Float[Tensor, "batch channels height width"], size: Size
) -> Float[Tensor, "batch channels rows columns"]:
    """Whole images, smaller."""
    check_window(size, (images.shape[2], images.shape[3]))
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def places_at_random(
    count: int, size: Size, plane: Size, generator: torch.Generator
) -> Int[Tensor, "count 2"]:
    """Middles (x, y) of windows that lie inside a plane, every place equally likely."""
    left = torch.randint(plane[1] - size[1] + 1, (count,), generator=generator)
    top = torch.randint(plane[0] - size[0] + 1, (count,), generator=generator)
    return torch.stack([left + size[1] // 2, top + size[0] // 2], 1)
