"""Integrated gradients: how much each part of an input adds to a score, along a path from a baseline."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingDependency, ModelMismatch

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


def input_embedding(model: nn.Module) -> nn.Embedding:
    """The layer that turns token ids into vectors: what the model names as such, or its first embedding.

    Raises:
        ModelMismatch: If there is none.
    """
    named = getattr(model, "get_input_embeddings", None)
    found = named() if callable(named) else None
    candidates = [found, *model.modules()]
    for module in candidates:
        if isinstance(module, nn.Embedding):
            return module
    raise ModelMismatch("The model has no embedding layer: it is no classifier of token ids.")


@contextmanager
def embedded_as(layer: nn.Embedding, vectors: Float[Tensor, "batch tokens dim"]) -> Generator[None]:
    """The embedding layer gives these vectors, whatever ids it sees."""
    handle = layer.register_forward_hook(lambda *_: vectors)
    try:
        yield
    finally:
        handle.remove()


def token_attribution(
    model: nn.Module,
    score: Callable[..., Float[Tensor, " batch"]],
    ids: Int[Tensor, "batch tokens"],
    baseline_ids: Int[Tensor, "batch tokens"] | None,
    *context: Tensor,
    zeroed: Tensor | None = None,
    steps: int = 32,
    quadrature: Quadrature = "gausslegendre",
) -> Attribution:
    """Share of each token in a score, by integrated gradients on the embeddings.

    Tokens that are the same in the baseline get exactly 0: keep a prompt's, change the answer's.

    Args:
        model: With an embedding layer.
        score: From ids [n, tokens] and `context` to [n], through the model.
        ids: Of the tokens.
        baseline_ids: Of the baseline; None for a baseline of zero vectors.
        *context: See `integrated_gradients`.
        zeroed: Which tokens get the zero vector [batch, tokens]; all by default. Only without baseline ids.
        steps: Points on the path.
        quadrature: See `integrated_gradients`.
    """
    layer = input_embedding(model)
    with torch.no_grad():
        vectors = layer(ids)
        if baseline_ids is not None:
            baselines = layer(baseline_ids)
        else:
            gone = torch.ones_like(ids, dtype=torch.bool) if zeroed is None else zeroed
            baselines = vectors.masked_fill(gone[..., None], 0.0)

    def through(points: Tensor, tokens: Tensor, *rest: Tensor) -> Tensor:
        with embedded_as(layer, points):
            return score(tokens, *rest)

    found = integrated_gradients(
        through, vectors, baselines, ids, *context, steps=steps, quadrature=quadrature
    )
    return Attribution(found.values.sum(-1), found.score_input, found.score_baseline)


def answer_score(
    logits: Float[Tensor, "batch tokens vocabulary"],
    ids: Int[Tensor, "batch tokens"],
    positions: Int[Tensor, " answer"],
) -> Float[Tensor, " batch"]:
    """Log-probability of the tokens at `positions`, each given those before it.

    Raises:
        InvalidHyperparameter: If there are no positions, or one has no token before it.
    """
    if positions.numel() == 0 or int(positions.min()) < 1:
        raise InvalidHyperparameter(
            f"Positions of an answer must be at least 1, for each needs a token before it: {positions.tolist()}."
        )
    steps = logits[:, positions - 1].log_softmax(-1)
    return steps.gather(2, ids[:, positions, None])[..., 0].sum(1)


def rank_tokens(
    ids: Int[Tensor, "batch tokens"],
    values: Float[Tensor, "batch tokens"],
    vocabulary: int,
    ignored: Sequence[int] = (),
) -> Int[Tensor, " ranked"]:
    """Token ids by falling sum of their shares of each text's positive attribution; only those above 0.

    Raises:
        InvalidRecords: If none is left.
    """
    positive = values.clamp(min=0)
    shares = positive / positive.sum(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    totals = values.new_zeros(vocabulary).index_add_(0, ids.flatten(), shares.flatten())
    totals[list(ignored)] = 0
    order = totals.argsort(descending=True, stable=True)
    ranked = order[totals[order] > 0]
    if not len(ranked):
        raise InvalidRecords("No token is left to rank: all that add to the class are to be ignored.")
    return ranked


def mask_tokens(
    ids: Int[Tensor, "batch tokens"], ranked: Int[Tensor, " ranked"], k: int, mask: int
) -> Int[Tensor, "batch tokens"]:
    """Texts in which every occurrence of the first k ranked tokens that a text holds is masked."""
    held = (ids[:, :, None] == ranked).any(1)
    chosen = held & (held.cumsum(1) <= k)
    return ids.masked_fill(((ids[:, :, None] == ranked) & chosen[:, None]).any(2), mask)


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
