"""Which tokens a score lives on: integrated gradients on embeddings, a ranking over texts, and masks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch
from palimpsest.parts.attribution import Attribution, Quadrature, integrated_gradients


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
    size = 1 + int(max(ids.max(), ranked.max()))
    places = ids.new_full((size,), size).index_copy_(0, ranked, torch.arange(len(ranked), device=ids.device))
    place = places[ids]
    ordered = place.sort(1).values
    distinct = torch.cat([torch.ones_like(ordered[:, :1]), (ordered.diff(dim=1) > 0).long()], 1).cumsum(1)
    last = ordered.masked_fill((distinct > k) | (ordered == size), -1).max(1).values
    return ids.masked_fill(place <= last[:, None], mask)
