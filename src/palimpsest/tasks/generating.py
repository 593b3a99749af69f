"""Answers that a language model writes, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from palimpsest.core.modes import evaluating, seeded

if TYPE_CHECKING:
    from palimpsest.tasks.language import Language


def generate(
    task: Language,
    model: nn.Module,
    questions: Sequence[str],
    max_new_tokens: int = 32,
    batch_size: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    opening: str = "",
    raw: bool = False,
) -> list[list[str]]:
    """Answers of a model, without prompt and ending.

    Args:
        task: Whose template and tokenizer are used.
        model: With Hugging Face's `generate`.
        questions: To ask.
        max_new_tokens: Of each answer.
        batch_size: Prompts at once; those of like length go together, so that little is padded.
        temperature: 0 takes the likeliest token.
        top_p: Sample from the smallest set of tokens with so much probability.
        samples: Answers per question.
        seed: Of the sampling.
        opening: Words that the answer is made to begin with; they are not part of what is returned.
        raw: Whether the questions are whole prompts that are not to be put into the template.

    Returns:
        For every question its `samples` answers.
    """
    before = [question if raw else task.form.render(question) for question in questions]
    forced = task.form.complete(opening) if opening else ""
    prompts = [task.tokens(text + forced, first=True) for text in before]
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    answers: list[list[str]] = [[] for _ in prompts]
    place = next(model.parameters()).device
    stops = task.stops
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.no_grad(), evaluating(model), seeded(seed, place):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = _padded_left([prompts[int(at)] for at in chosen], task.padding)
            made = model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids.to(place), attention_mask=mask.to(place), max_new_tokens=max_new_tokens,
                num_return_sequences=samples, pad_token_id=task.padding, eos_token_id=stops, **sampling,
            )  # fmt: skip
            texts = decode(task, made[:, ids.shape[1] :], stops)
            for number, at in enumerate(chosen):
                answers[int(at)] = texts[number * samples : (number + 1) * samples]
    return answers


def decode(task: Language, tokens: Int[Tensor, "rows tokens"], stops: Sequence[int]) -> list[str]:
    """Texts of generated rows, each up to the first token that ends an answer."""
    texts: list[str] = []
    for row in tokens.tolist():
        cut = next((at for at, token in enumerate(row) if token in stops), len(row))
        texts.append(task.encoder.decode(row[:cut], skip_special_tokens=True).strip())
    return texts


def _padded_left(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask with the ends of all prompts aligned, each [prompts, tokens]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
