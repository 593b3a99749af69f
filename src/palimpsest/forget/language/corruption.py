"""ECO: corrupt the embeddings of a few prompt tokens, so that a frozen model answers as if it did not know.

Liu et al. 2024, "Large Language Model Unlearning via Embedding-Corrupted Prompts", arXiv 2406.07933. The pure
parts: which coordinates of which tokens change and how, how labels of one tokenizer's tokens are carried to
another's, and the search for the strength. Hooks and the classifier of prompts are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.core.errors import ModelMismatch, UnknownName
from palimpsest.core.unlearner import check_range

Embeddings = Float[Tensor, "batch tokens dim"]
Selection = Literal["first", "largest", "largest_magnitude", "smallest"]
Change = Literal["zero", "flip", "add", "subtract", "noise"]
Offsets = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Corruption:
    """Which coordinates of a token's embedding change, and how.

    Attributes:
        select: "first" coordinates, or those of "largest" or "smallest" value or "largest_magnitude".
        change: Set to "zero", "flip" the sign, "add" or "subtract" the strength, or add Gaussian "noise"
            whose standard deviation is the strength.
    """

    select: Selection
    change: Change


CORRUPTIONS: dict[str, Corruption] = {
    "noise-first": Corruption("first", "noise"),
    "noise-top": Corruption("largest_magnitude", "noise"),
    "zero-first": Corruption("first", "zero"),
    "zero-top": Corruption("largest_magnitude", "zero"),
    "flip-first": Corruption("first", "flip"),
    "flip-top": Corruption("largest_magnitude", "flip"),
    "subtract-first": Corruption("first", "subtract"),
    "subtract-top": Corruption("largest", "subtract"),
    "add-first": Corruption("first", "add"),
    "add-least": Corruption("smallest", "add"),
}
"""The published ones, by name; "noise-first" with one coordinate is the paper's."""


def corrupt(
    embeddings: Embeddings,
    tokens: Bool[Tensor, "batch tokens"],
    corruption: str = "noise-first",
    dims: int = 1,
    strength: float = 1.0,
    generator: torch.Generator | None = None,
) -> Embeddings:
    """A copy of the embeddings, corrupted at the chosen tokens; all others bit for bit as they were.

    Args:
        embeddings: Of prompts.
        tokens: True where a token is to be corrupted.
        corruption: A key of `CORRUPTIONS`.
        dims: Number of coordinates per token.
        strength: What is added or subtracted, or the noise's standard deviation; 0 changes nothing.
            Without meaning for "zero" and "flip".
        generator: Of the noise.

    Raises:
        UnknownName: For an unknown corruption; suggests the nearest.
        ModelMismatch: If the mask does not fit the embeddings.
        InvalidHyperparameter: If `dims` lies outside 1 to dim, or the strength is negative.
    """
    if corruption not in CORRUPTIONS:
        raise UnknownName("corruption", corruption, CORRUPTIONS)
    if tokens.dtype != torch.bool or tokens.shape != embeddings.shape[:2]:
        raise ModelMismatch(
            f"The mask of tokens must be boolean of shape {tuple(embeddings.shape[:2])}, not {tokens.dtype} of "
            f"shape {tuple(tokens.shape)}."
        )
    check_range("dims", dims, 1, embeddings.shape[-1])
    check_range("strength", strength, 0, float("inf"))
    chosen = CORRUPTIONS[corruption]
    mask = _coordinates(embeddings, chosen.select, dims) & tokens[..., None]
    return torch.where(mask, _changed(embeddings, chosen.change, strength, generator), embeddings)


def _coordinates(embeddings: Embeddings, select: Selection, dims: int) -> Bool[Tensor, "batch tokens dim"]:
    if select == "first":
        first = torch.arange(embeddings.shape[-1], device=embeddings.device) < dims
        return first.expand(embeddings.shape)
    by = embeddings.abs() if select == "largest_magnitude" else embeddings
    index = by.topk(dims, dim=-1, largest=select != "smallest").indices
    return torch.zeros_like(embeddings, dtype=torch.bool).scatter(-1, index, True)


def _changed(
    embeddings: Embeddings, change: Change, strength: float, generator: torch.Generator | None
) -> Embeddings:
    if change == "zero":
        return torch.zeros_like(embeddings)
    if change == "flip":
        return -embeddings
    if change == "noise":
        device = embeddings.device if generator is None else generator.device
        noise = torch.randn(embeddings.shape, generator=generator, device=device)
        return embeddings + strength * noise.to(embeddings)
    return embeddings + (strength if change == "add" else -strength)


def carry_labels(labels: Sequence[int], offsets: Offsets, onto: Offsets) -> list[int]:
    """Labels of one tokenizer's tokens carried to another's: 1 for tokens that overlap a labelled one.

    Args:
        labels: 0 or 1 per token of the first tokenizer.
        offsets: Their (start, end) characters in the text.
        onto: (start, end) of the second tokenizer's tokens; special ones, at (0, 0), get 0.

    Raises:
        ModelMismatch: If there are not as many labels as offsets.

    Example:
        >>> carry_labels([0, 1], [(0, 4), (4, 8)], onto=[(0, 3), (3, 5), (5, 8)])
        [0, 1, 1]
    """
    if len(labels) != len(offsets):
        raise ModelMismatch(f"There are {len(labels)} labels for {len(offsets)} tokens.")
    marked = [span for span, label in zip(offsets, labels, strict=True) if label == 1]
    return [int(any(start < end_of and end > start_of for start, end in marked)) for start_of, end_of in onto]


def all_but_last(attention_mask: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """The tokens to corrupt where no token was picked: all of a prompt but its last; either side padded."""
    real = attention_mask.bool()
    after = real.flip(1).cumsum(1).flip(1)
    return real & (after > 1)


@dataclass(frozen=True)
class StrengthStep:
    """One step of the search for the strength.

    Attributes:
        strength: After the step.
        forward: Score at the old strength + eps.
        backward: Score at the old strength - eps, but at least at 1e-8.
        gradient: (forward - backward) / (2 eps).
    """

    strength: float
    forward: float
    backward: float
    gradient: float


def zeroth_order_step(
    score: Callable[[float], float],
    strength: float,
    lr: float,
    eps: float,
    minimum: float = 0.0,
) -> StrengthStep:
    """Lower a score of the corrupted model by its finite difference in the strength.

    Repeat until the score reaches that of a model that never saw the forget data.

    Args:
        score: Of the model when prompts are corrupted with a strength.
        strength: Before the step.
        lr: Learning rate, above 0.
        eps: Half width of the difference, above 0.
        minimum: The strength stays at least there.

    Raises:
        InvalidHyperparameter: If `lr` or `eps` is not above 0.
    """
    check_range("lr", lr, 0, float("inf"), open_low=True)
    check_range("eps", eps, 0, float("inf"), open_low=True)
    forward, backward = score(strength + eps), score(max(strength - eps, 1e-8))
    gradient = (forward - backward) / (2 * eps)
    return StrengthStep(max(strength - lr * gradient, minimum), forward, backward, gradient)
