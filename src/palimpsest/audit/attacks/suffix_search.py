"""A suffix that makes a language model say given answers, found by gradient-guided swaps of its tokens.

Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043) for one suffix that works for many questions:
the gradient of the loss by the suffix's embeddings proposes tokens for every place, some of the proposals
are tried, the best is kept. A suffix can force ANY string (arXiv 2502.15836): only what it brings out beyond
facts that it was not fitted to, and beyond models that never saw them, is knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidAudit, ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.tasks.language import Language
from palimpsest.tasks.scoring import token_scores

Pair = tuple[str, str]
"""A question and the answer that the model is to give."""


@dataclass(frozen=True)
class Budget:
    """What a search may cost; the same for every model.

    Attributes:
        length: Tokens of the suffix.
        steps: Swaps tried one after the other.
        candidates: Swaps evaluated per step.
        top_k: Tokens proposed for every place.
    """

    length: int = 10
    steps: int = 100
    candidates: int = 32
    top_k: int = 32

    def __post_init__(self) -> None:
        if min(self.length, self.steps, self.candidates, self.top_k) < 1:
            raise InvalidAudit(f"length, steps, candidates and top_k must be at least 1: {self}.")


@dataclass(frozen=True)
class Found:
    """A suffix and how it was reached.

    Attributes:
        tokens: Of the suffix.
        before: Mean loss per answer token with the first, random suffix.
        after: With the best one.
        curve: Best loss after every step.
    """

    tokens: Int[Tensor, " length"]
    before: float
    after: float
    curve: tuple[float, ...]


class Rows:
    """Questions with a hole for a suffix, and answers, as padded tokens.

    Args:
        task: Whose template is used; the suffix stands right behind the question.
        pairs: Questions and answers.
        length: Tokens of the suffix.

    Raises:
        InvalidAudit: If there is no pair, or an answer has no token.
    """

    def __init__(self, task: Language, pairs: Sequence[Pair], length: int):
        if not pairs:
            raise InvalidAudit("A suffix needs at least one question to be fitted to.")
        before, _, after = task.form.prompt.partition("{question}")
        tail = task.tokens(after)
        rows: list[list[int]] = []
        starts: list[int] = []
        holes: list[int] = []
        for question, answer in pairs:
            head = task.tokens(before + question, first=True)
            said = task.tokens(task.form.complete(answer))
            if not said:
                raise InvalidAudit(f"The answer {answer!r} tokenizes to nothing.")
            holes.append(len(head))
            starts.append(len(head) + length + len(tail))
            rows.append([*head, *([0] * length), *tail, *said])
        batch = task.padded(rows, starts)
        self.ids, self.mask, self.labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        self.at = torch.tensor(holes)[:, None] + torch.arange(length)

    def filled(self, suffix: Int[Tensor, "suffixes length"]) -> Int[Tensor, "rows tokens"]:
        """Tokens with each of the suffixes in the hole, suffix after suffix."""
        ids = self.ids.repeat(len(suffix), 1)
        at = self.at.repeat(len(suffix), 1)
        return ids.scatter(1, at, suffix.repeat_interleave(len(self.ids), 0))


def search(
    task: Language, model: nn.Module, pairs: Sequence[Pair], budget: Budget, random: torch.Generator
) -> Found:
    """The best suffix that the budget finds.

    Raises:
        ModelMismatch: If the model has no embedding, or does not take embedded inputs.
    """
    rows = Rows(task, pairs, budget.length)
    weight = _embedding(model)
    allowed = _allowed(task, weight)
    suffix = allowed[torch.randint(len(allowed), (budget.length,), generator=random)]
    with evaluating(model):
        best = before = float(losses(task, model, rows, suffix[None])[0])
        curve: list[float] = []
        for _ in range(budget.steps):
            tried = _proposals(task, model, rows, suffix, weight, allowed, budget, random)
            values = losses(task, model, rows, tried)
            chosen = int(values.argmin())
            if float(values[chosen]) < best:
                best, suffix = float(values[chosen]), tried[chosen]
            curve.append(best)
    return Found(suffix, before, best, tuple(curve))


@torch.no_grad()
def losses(
    task: Language, model: nn.Module, rows: Rows, suffixes: Int[Tensor, "suffixes length"]
) -> Float[Tensor, " suffixes"]:
    """Mean loss of the answers' tokens over all rows, for each suffix."""
    place = next(model.parameters()).device
    count = len(suffixes)
    logits = task.logits(
        model,
        {
            "input_ids": rows.filled(suffixes).to(place),
            "attention_mask": rows.mask.repeat(count, 1).to(place),
        },
    )
    scores = token_scores(logits[:, :-1], rows.labels.repeat(count, 1)[:, 1:].to(place))
    return scores.mean.reshape(count, -1).mean(1).cpu()


@torch.no_grad()
def forced(
    task: Language, model: nn.Module, pairs: Sequence[Pair], suffix: Int[Tensor, " length"]
) -> Bool[Tensor, " pairs"]:
    """Whether every token of each answer is the likeliest behind question and suffix: greedy decoding gives it."""
    place = next(model.parameters()).device
    rows = Rows(task, pairs, len(suffix))
    with evaluating(model):
        logits = task.logits(
            model, {"input_ids": rows.filled(suffix[None]).to(place), "attention_mask": rows.mask.to(place)}
        )
    scores = token_scores(logits[:, :-1], rows.labels[:, 1:].to(place))
    return (scores.right | ~scores.mask).all(1).cpu()


def _proposals(
    task: Language, model: nn.Module, rows: Rows, suffix: Tensor, weight: Tensor, allowed: Tensor,
    budget: Budget, random: torch.Generator,
) -> Int[Tensor, "candidates length"]:  # fmt: skip
    """Suffixes with one token swapped for one that the gradient likes."""
    place = weight.device
    ids = rows.filled(suffix[None]).to(place)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        shared = weight[suffix.to(place)].detach().clone().requires_grad_(True)
        embedded = weight.detach()[ids].clone()
        at = rows.at.to(place)[:, :, None].expand(-1, -1, weight.shape[1])
        embedded = embedded.scatter(1, at, shared[None].expand(len(ids), -1, -1))
        try:
            logits = model(inputs_embeds=embedded, attention_mask=rows.mask.to(place)).logits
        except TypeError as problem:
            raise ModelMismatch(
                "The model does not take embedded inputs: no suffix can be searched."
            ) from problem
        loss = token_scores(logits[:, :-1], rows.labels[:, 1:].to(place)).mean.mean()
        (gradient,) = torch.autograd.grad(loss, shared)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
    liked = -(gradient @ weight.detach()[allowed.to(place)].T)
    top = allowed[liked.topk(min(budget.top_k, len(allowed)), 1).indices.cpu()]
    where = torch.randint(budget.length, (budget.candidates,), generator=random)
    which = torch.randint(top.shape[1], (budget.candidates,), generator=random)
    tried = suffix.repeat(budget.candidates, 1)
    tried[torch.arange(budget.candidates), where] = top[where, which]
    return tried


def _embedding(model: nn.Module) -> Float[Tensor, "vocabulary dim"]:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is None:
        raise ModelMismatch("The model has no token embedding: no suffix can be searched.")
    return embedding.weight


def _allowed(task: Language, weight: Tensor) -> Int[Tensor, " tokens"]:
    """Tokens that a suffix may have: none with a special meaning."""
    special = set(task.encoder.all_special_ids)
    return torch.tensor([at for at in range(min(len(weight), len(task.encoder))) if at not in special])
