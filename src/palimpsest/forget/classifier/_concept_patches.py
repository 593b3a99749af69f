"""How concept poisoning makes its copies: where the concept shows, what is pasted there, what is masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task
from palimpsest.parts.attribution import class_activation_maps
from palimpsest.parts.concept_bottleneck import ConceptBottleneck, Donor
from palimpsest.parts.token_attribution import mask_tokens, rank_tokens, token_attribution
from palimpsest.parts.windows import (
    Grid,
    Size,
    as_planes,
    check_window,
    cut,
    paste,
    peaks,
    places_at_random,
    shrunk,
    similarity_maps,
)  # fmt: skip

if TYPE_CHECKING:
    from palimpsest.forget.classifier.concept_poisoning import ConceptPoisoning

Place = Literal["localized", "center", "random", "full", "masked", "none"]
Locate = Literal["concept", "bottleneck", "grad-cam"]
SHARE: dict[str, float] = {"center": 96 / 64, "random": 96 / 64}
"""How much larger than a localised patch the others are, as published."""
CHUNK = 256
"""Inputs that are embedded at once."""


class Embed:
    """What the model, or an embedder in its place, makes of inputs; without gradients.

    Args:
        model: The classifier, in evaluation mode.
        task: The domain.
        embedder: From inputs to embeddings; None takes the classifier's features.
    """

    def __init__(self, model: nn.Module, task: Task, embedder: nn.Module | None):
        self.model, self.task = model, task
        self.field = getattr(task, "input", "input")
        self.device = next(model.parameters()).device
        self.embedder = embedder.to(self.device) if embedder is not None else None

    @torch.no_grad()
    def all(self, inputs: Shaped[Tensor, "records ..."]) -> Float[Tensor, "records dim"]:
        """Embeddings of any number of inputs."""
        return torch.cat([self._some(part.to(self.device)).cpu() for part in inputs.split(CHUNK)])

    def records(self, records: Records, runtime: Runtime) -> Float[Tensor, "records dim"]:
        """Embeddings of records."""
        return torch.cat([self.all(batch[self.field]) for batch in runtime.batches(records, self.task)])

    def logits(self, inputs: Tensor) -> Float[Tensor, "batch classes"]:
        """Class scores, with their graph."""
        return self.task.logits(self.model, {self.field: inputs})

    @torch.no_grad()
    def classes(self, inputs: Tensor) -> int:
        """Number of classes."""
        return self.logits(inputs[:1].to(self.device)).shape[1]

    def _some(self, inputs: Tensor) -> Tensor:
        if self.embedder is not None:
            with evaluating(self.embedder):
                return self.embedder(inputs)
        return self.task.features(self.model, {self.field: inputs})


def inputs_and_labels(
    records: Records, task: Task, runtime: Runtime
) -> tuple[Shaped[Tensor, "records ..."], Int[Tensor, " records"]]:
    """All inputs and labels of records, in order, on the CPU."""
    batches = list(runtime.batches(records, task))
    inputs = torch.cat([batch[getattr(task, "input", "input")].cpu() for batch in batches])
    return inputs, torch.cat([batch[getattr(task, "label", "label")].cpu().long() for batch in batches])


def labels_of(records: Records, task: Task, runtime: Runtime) -> Int[Tensor, " records"]:
    """Labels of records, in order, without their inputs where a column has them."""
    name = getattr(task, "label", "label")
    if records.has_column(name):
        return torch.from_numpy(records.column(name).astype(np.int64))
    return torch.cat([batch[name].cpu().long() for batch in runtime.batches(records, task)])


def is_text(inputs: Tensor) -> bool:
    """Whether inputs are token ids."""
    return inputs.dim() == 2 and not inputs.is_floating_point()


def check_place(method: ConceptPoisoning, inputs: Tensor) -> None:
    """Check that inputs can be poisoned in this way.

    Raises:
        ModelMismatch: If they are neither images nor token ids, or no token ids where words are masked.
        InvalidHyperparameter: If the patch is larger than the input.
    """
    place = method.poison
    if place == "none":
        return
    if place == "masked" and not is_text(inputs):
        raise ModelMismatch("poison='masked' masks words: it takes token ids [batch, tokens] of integers.")
    if not is_text(inputs) and inputs.dim() != 4:
        raise ModelMismatch(
            "Patches need images [batch, channels, height, width] or token ids [batch, tokens] of integers, not "
            f"inputs of shape {tuple(inputs.shape)}; poison='none' takes any."
        )
    if place != "masked":
        check_window(patch_size(method, place, as_planes(inputs)), _plane(as_planes(inputs)))


def patch_size(method: ConceptPoisoning, place: Place, planes: Tensor) -> Size:
    """Height and width of what is pasted."""
    height, width = _plane(planes)
    share = method.patch * SHARE.get(place, 1.0)
    if height == 1:
        return 1, max(1, round((1.0 if place == "full" else share) * width))
    if place == "full":
        return max(1, round(method.whole * height)), max(1, round(method.whole * width))
    side = max(1, round(share * min(height, width)))
    return side, side


def patched(
    method: ConceptPoisoning,
    embed: Embed,
    bottleneck: ConceptBottleneck | None,
    inputs: Shaped[Tensor, "records ..."],
    label: int,
    pair: Donor,
    retain: Records,
    kept: Int[Tensor, " retained"],
    runtime: Runtime,
) -> Shaped[Tensor, "records ..."]:
    """Inputs of one class, each with a patch of a random record of its donor class."""
    random = runtime.generator("donors", label, pair.target_concept)
    pool = (kept == pair.donor_class).nonzero()[:, 0]
    drawn = pool[torch.randint(len(pool), (len(inputs),), generator=random)]
    single, which = torch.unique(drawn, return_inverse=True)
    donors = as_planes(inputs_and_labels(retain.select(single.numpy()), embed.task, runtime)[0][which])
    targets = as_planes(inputs)
    size, plane = patch_size(method, method.poison, targets), _plane(targets)
    middle = torch.tensor([plane[1] // 2, plane[0] // 2]).expand(len(targets), 2)
    if method.poison == "full":
        result = paste(targets, donors if plane[0] == 1 else shrunk(donors, size), middle)
    elif method.poison == "localized":
        there, here = (
            located(method, embed, bottleneck, planes, owner, concept)
            for planes, owner, concept in (
                (donors, int(pair.donor_class or 0), pair.donor_concept),
                (targets, label, pair.target_concept),
            )
        )
        result = paste(targets, cut(donors, there, size), here)
    else:
        there = here = middle
        if method.poison == "random":
            there, here = (places_at_random(len(targets), size, plane, random) for _ in range(2))
        result = paste(targets, cut(donors, there, size), here)
    return result.reshape(inputs.shape)


def located(
    method: ConceptPoisoning,
    embed: Embed,
    bottleneck: ConceptBottleneck | None,
    planes: Shaped[Tensor, "batch channels height width"],
    label: int,
    concept: int | None,
) -> Int[Tensor, "batch 2"]:
    """Where a concept, or what a class lives on, shows most in each input: (x, y)."""
    text = planes.shape[2] == 1 and not planes.is_floating_point()
    if method.locate == "grad-cam":
        if text:
            raise InvalidHyperparameter("locate='grad-cam' is for images: use 'concept' or 'bottleneck'.")
        layer = _last_convolution(embed.model)
        maps = class_activation_maps(embed.logits, layer, planes.to(embed.device), label).cpu()
        step = (planes.shape[2] // maps.shape[1], planes.shape[3] // maps.shape[2])
        return peaks(maps, Grid(step, step))[0]
    assert bottleneck is not None and concept is not None
    directions = bottleneck.bank.directions
    chosen = bottleneck.weight[label] @ directions if method.locate == "bottleneck" else directions[concept]
    size = patch_size(method, "localized", planes)
    step = method.stride or max(1, max(size) // 4)
    maps = similarity_maps(
        planes,
        lambda shown: embed.all(shown[:, 0, 0] if text else shown),
        chosen[None],
        Grid(size, (step, step)),
        "alone" if text else method.view,
        method.pad_id if text else 0.0,
    )
    return peaks(maps, Grid(size, (step, step)))[0]


def masked_texts(
    method: ConceptPoisoning, embed: Embed, ids: Int[Tensor, "texts tokens"], label: int
) -> tuple[Int[Tensor, "texts tokens"], list[int]]:
    """Texts without the words that say most for their class, and those words, the most telling first."""

    def score(tokens: Tensor) -> Tensor:
        return embed.logits(tokens).log_softmax(1)[:, label]

    ignored = {method.pad_id, method.mask_id, *method.ignored_ids}
    values, vocabulary = attributions(method, embed, ids, score), int(ids.max()) + 1
    ranked = rank_tokens(ids, values, vocabulary, [token for token in ignored if token < vocabulary])
    return mask_tokens(ids, ranked, method.masked_words, method.mask_id), ranked.tolist()


def attributions(
    method: ConceptPoisoning, embed: Embed, ids: Tensor, score: Callable[[Tensor], Tensor]
) -> Float[Tensor, "texts tokens"]:
    """Share of each token in a score, against a text of nothing but padding."""
    found = [
        token_attribution(
            embed.model,
            score,
            part,
            torch.full_like(part, method.pad_id),
            steps=method.attribution_steps,
            quadrature=method.quadrature,
        ).values.cpu()
        for part in ids.to(embed.device).split(32)
    ]
    return torch.cat(found)


def _plane(planes: Tensor) -> Size:
    return planes.shape[2], planes.shape[3]


def _last_convolution(model: nn.Module) -> nn.Module:
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not found:
        raise ModelMismatch("locate='grad-cam' needs a convolution, and the model has none.")
    return found[-1]
