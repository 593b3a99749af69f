"""What a language model gives to tokens: of labelled batches, and of several answers to one question."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidLabels
from palimpsest.core.modes import evaluating
from palimpsest.parts.scored_head import head_at
from palimpsest.parts.tokens import IGNORED, scored

if TYPE_CHECKING:
    from palimpsest.tasks.language import Language

Row = tuple[int, list[int], int]
"""Number of the question, tokens of prompt and answer, number of tokens of the prompt."""


@dataclass(frozen=True)
class Scores:
    """What a model gives to the tokens of given answers.

    Attributes:
        losses: -log p of each token, in nats, 0 beyond the end, [answers, tokens].
        right: Whether the token is the likeliest, [answers, tokens].
        mask: Which entries are tokens, [answers, tokens].
    """

    losses: Float[Tensor, "answers tokens"]
    right: Bool[Tensor, "answers tokens"]
    mask: Bool[Tensor, "answers tokens"]

    @property
    def mean(self) -> Float[Tensor, " answers"]:
        """Mean token loss; exp(-mean) is the length-normalised probability."""
        return self.losses.sum(1) / self.mask.sum(1).clamp(min=1)

    @property
    def total(self) -> Float[Tensor, " answers"]:
        """Minus the log-likelihood."""
        return self.losses.sum(1)


def score(
    task: Language,
    model: nn.Module,
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    batch_size: int = 64,
) -> list[Scores]:
    """What a model gives to several answers of each question, with one pass over the question.

    The keys and values of a prompt are computed once and used by all of its answers. A model that keeps
    no cache is given prompt and answer together, with the same result.

    Args:
        task: Whose template and tokenizer are used.
        model: To ask.
        questions: To ask.
        answers: Of each question at least one.
        batch_size: Questions at once.

    Returns:
        Scores of the answers, per question, on the CPU.

    Raises:
        InvalidLabels: If a question has no answer, or an answer tokenizes to nothing.
    """
    if len(questions) != len(answers) or not all(answers):
        raise InvalidLabels("Every question needs at least one answer to score.")
    result: list[Scores] = []
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(questions), batch_size):
            chunk = slice(start, start + batch_size)
            result.extend(_score(task, model, questions[chunk], answers[chunk]))
    return result


def _score(
    task: Language, model: nn.Module, questions: Sequence[str], answers: Sequence[Sequence[str]]
) -> list[Scores]:
    rows = [(at, *task.encode(questions[at], answer)) for at, given in enumerate(answers) for answer in given]
    for at, ids, start in rows:
        if len(ids) == start:
            raise InvalidLabels(f"An answer to {questions[at]!r} tokenizes to nothing.")
    place = next(model.parameters()).device
    logits, targets = _continued(task, model, questions, rows, place)
    scores = token_scores(logits, targets)
    sizes = [len(given) for given in answers]
    parts = [torch.split(part.cpu(), sizes) for part in (scores.losses, scores.right, scores.mask)]
    return [Scores(*piece) for piece in zip(*parts, strict=True)]


def _continued(
    task: Language, model: nn.Module, questions: Sequence[str], rows: Sequence[Row], place: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits and targets of the answers, after one pass over the prompts."""
    prompts = [task.prompt(question) for question in questions]
    first = {key: value.to(place) for key, value in task.padded(prompts, [0] * len(prompts)).items()}
    lengths = first["attention_mask"].sum(1)
    last = torch.arange(first["input_ids"].shape[1], device=place) == lengths[:, None] - 1
    with head_at(model, last):
        output = model(input_ids=first["input_ids"], attention_mask=first["attention_mask"], use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None or not hasattr(cache, "batch_select_indices"):
        return _whole(task, model, rows, place)
    owner = torch.tensor([at for at, _, _ in rows], device=place)
    cache.batch_select_indices(owner)
    answers = task.padded([ids[start:] for _, ids, start in rows], [0] * len(rows))
    targets = answers["labels"].to(place)
    after = answers["input_ids"].to(place)[:, :-1]
    logits = output.logits if output.logits.dim() == 2 else at_positions(output.logits, lengths - 1)
    opening = logits[owner][:, None]
    if after.shape[1] == 0:
        return opening, targets
    mask = torch.cat([first["attention_mask"][owner], answers["attention_mask"].to(place)[:, :-1]], 1)
    positions = lengths[owner][:, None] + torch.arange(after.shape[1], device=place)
    again = {cache_argument(model): cache}
    rest = model(input_ids=after, attention_mask=mask, position_ids=positions, use_cache=True, **again).logits
    return torch.cat([opening, rest], 1), targets


def cache_argument(model: nn.Module) -> str:
    """What a model calls the keys and values that it is handed back: newer releases of transformers, "cache"."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    return "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"


def _whole(
    task: Language, model: nn.Module, rows: Sequence[Row], place: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits and targets of the answers, with every prompt passed again."""
    batch = task.padded([ids for _, ids, _ in rows], [start for _, _, start in rows])
    logits = task.logits(model, {key: value.to(place) for key, value in batch.items()})
    answers = task.padded([ids[start:] for _, ids, start in rows], [0] * len(rows))
    targets = answers["labels"].to(place)
    before = torch.tensor([start for _, _, start in rows], device=place)[:, None] - 1
    at = (before + torch.arange(targets.shape[1], device=place)).clamp(max=logits.shape[1] - 1)
    return logits.gather(1, at[:, :, None].expand(-1, -1, logits.shape[2])), targets


def token_scores(
    logits: Float[Tensor, "rows tokens vocabulary"], targets: Int[Tensor, "rows tokens"]
) -> Scores:
    """Losses of target tokens, given the logits that predict them (already aligned)."""
    mask = targets != IGNORED
    chosen = targets.clamp(min=0)
    losses = -logits.float().log_softmax(-1).gather(2, chosen[:, :, None])[:, :, 0]
    return Scores(losses.masked_fill(~mask, 0.0), (logits.argmax(-1) == chosen) & mask, mask)


def observed_tokens(
    rows: Float[Tensor, "scored vocabulary"], labels: Int[Tensor, "batch tokens"]
) -> dict[str, Tensor]:
    """Measurements per labelled token, each [batch, tokens], shifted to the left so that answers begin at 0.

    Args:
        rows: Logits that predict the labelled tokens, in the order of rows and positions.
        labels: Of the batch.
    """
    mask = scored(labels)
    log_p = rows.log_softmax(-1)
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    target = labels[:, 1:][mask]
    parts = {
        "log_probability": log_p.gather(1, target[:, None])[:, 0],
        "right": log_p.argmax(-1) == target,
        "mean": mean,
        "deviation": ((p * log_p**2).sum(-1) - mean**2).clamp(min=0).sqrt(),
    }
    counts = mask.sum(1, keepdim=True)
    width = int(counts.max()) if mask.numel() else 0
    kept = torch.arange(width, device=labels.device) < counts
    return {"mask": kept} | {
        name: part.new_zeros(kept.shape).masked_scatter(kept, part) for name, part in parts.items()
    }


def last_prompt(labels: Int[Tensor, "batch tokens"]) -> Int[Tensor, " batch"]:
    """Position of the token before the first scored one: where the answer is about to begin."""
    return scored(labels).long().argmax(1)


def at_positions(
    states: Float[Tensor, "batch tokens ..."], at: Int[Tensor, " batch"]
) -> Float[Tensor, "batch ..."]:
    """What stands at one position of every row."""
    return states[torch.arange(len(states), device=states.device), at]
