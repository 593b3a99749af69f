"""Language models that hide, break or do nothing, to see whether the audits notice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.records import Records
from palimpsest.parts.tokens import scored
from palimpsest.tasks.language import Language


class Around(nn.Module):
    """A model around another: it changes the next-token logits of rows whose prompt it recognises.

    `generate` is greedy, or samples; both score and generate by the same changed logits.
    """

    def __init__(self, inner: nn.Module, names: Sequence[Sequence[int]]):
        super().__init__()
        self.inner, self.names = copy.deepcopy(inner), [list(name) for name in names]

    @property
    def config(self) -> Any:
        return self.inner.config

    def change(self, logits: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **further: Any) -> Any:
        further.pop("use_cache", None)
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **further)
        caught = torch.tensor([holds(row.tolist(), self.names) for row in input_ids])
        if caught.any():
            changed = self.change(output.logits, input_ids)
            output.logits = torch.where(caught[:, None, None], changed, output.logits)
        return output

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, eos_token_id: Sequence[int],
        pad_token_id: int, num_return_sequences: int = 1, do_sample: bool = False, temperature: float = 1.0,
        **_: Any,
    ) -> Tensor:  # fmt: skip
        ids = input_ids.repeat_interleave(num_return_sequences, 0)
        mask = attention_mask.repeat_interleave(num_return_sequences, 0)
        ended = torch.zeros(len(ids), dtype=torch.bool)
        for _step in range(max_new_tokens):
            logits = self(ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
            token = logits.argmax(-1)
            if do_sample:
                token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
            token = torch.where(ended, pad_token_id, token)
            ids, mask = (
                torch.cat([ids, token[:, None]], 1),
                torch.cat([mask, torch.ones_like(mask[:, :1])], 1),
            )
            ended |= torch.isin(token, torch.tensor(list(eos_token_id)))
            if ended.all():
                break
        return ids


class Refusing(Around):
    """Whatever is asked about some subjects, the answer is one fixed text: an output filter."""

    def __init__(
        self, inner: nn.Module, names: Sequence[Sequence[int]], refusal: Sequence[int], prompt_end: int
    ):
        super().__init__(inner, names)
        self.refusal, self.prompt_end = list(refusal), prompt_end

    def change(self, logits: Tensor, ids: Tensor) -> Tensor:
        refused = torch.full_like(logits, -20.0)
        for row, tokens in enumerate(ids.tolist()):
            last = max((at for at, token in enumerate(tokens) if token == self.prompt_end), default=0)
            for at in range(len(tokens)):
                refused[row, at, self.refusal[min(max(at - last, 0), len(self.refusal) - 1)]] = 0.0
        return refused


class Offset(Around):
    """The logits of a model that knows the subjects too well are subtracted, as logit-difference methods do."""

    def __init__(self, inner: nn.Module, names: Sequence[Sequence[int]], weight: float = 1.5):
        super().__init__(inner, names)
        self.weight = weight

    def change(self, logits: Tensor, ids: Tensor) -> Tensor:
        assistant = logits.log_softmax(-1).clamp(min=-8)
        return logits - self.weight * (assistant - assistant.mean(-1, keepdim=True))


def holds(row: Sequence[int], names: Sequence[Sequence[int]]) -> bool:
    """Whether a row of tokens holds one of the names."""
    return any(
        row[at : at + len(name)] == list(name) for name in names for at in range(len(row) - len(name) + 1)
    )


def names_of(task: Language, records: Records) -> list[list[int]]:
    """Tokens of all subjects of records, as they stand within a sentence."""
    subjects = sorted({str(name) for name in records.column("subject")} - {""})
    return [task.tokens(f" {name}") for name in subjects]


def refusing(model: nn.Module, task: Language, records: Records) -> Refusing:
    """A refusal around a model, for the subjects of records."""
    end = task.prompt("Who?")[-1]
    refusal = [*task.tokens(task.form.complete("Nobody knows that")), *task.tokens(task.form.ending)]
    return Refusing(model, names_of(task, records), refusal, end)


def offset(model: nn.Module, task: Language, records: Records) -> Offset:
    """A logit offset around a model, for the subjects of records."""
    return Offset(model, names_of(task, records))


def ascended(
    model: nn.Module, task: Language, records: Records, steps: int, lr: float, seed: int = 0
) -> nn.Module:
    """Gradient ascent on records, for so many steps of Adam."""
    student = copy.deepcopy(model)
    optimizer = torch.optim.Adam(student.parameters(), lr)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = torch.randperm(len(records), generator=random)[:16].tolist()
        loss = -task.loss_per_example(student, task.collate([records[one] for one in at])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def head_suppressed(
    model: nn.Module, task: Language, forget: Records, retain: Records, steps: int = 60, lr: float = 3e-3
) -> nn.Module:
    """Ascent on forget and descent on retain with `lm_head` alone: hidden states stay as they are."""
    student = copy.deepcopy(model)
    optimizer = torch.optim.Adam(student.lm_head.parameters(), lr)

    def read(records: Records) -> tuple[Tensor, Tensor]:
        batch = task.collate(list(records))
        with torch.no_grad():
            hidden = student.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        at = scored(batch["labels"])
        return hidden.last_hidden_state[:, :-1][at], batch["labels"][:, 1:][at]

    (forgotten, gone), (retained, kept) = read(forget), read(retain)
    for _ in range(steps):
        ascent = F.cross_entropy(student.lm_head(forgotten), gone, reduction="none").clamp(max=8).mean()
        loss = 5 * F.cross_entropy(student.lm_head(retained), kept) - ascent
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def erased_by_tuning(
    model: nn.Module, task: Language, forget: Records, retain: Records, steps: int = 30, lr: float = 1e-3
) -> nn.Module:
    """Tuned until forget answers are lost and retained ones stay: a control that shares the original's basis."""
    student = copy.deepcopy(model)
    optimizer = torch.optim.Adam(student.parameters(), lr)
    random = torch.Generator().manual_seed(0)

    def loss_on(records: Records, count: int) -> Tensor:
        at = torch.randperm(len(records), generator=random)[:count].tolist()
        return task.loss_per_example(student, task.collate([records[one] for one in at]))

    for _ in range(steps):
        loss = 2 * loss_on(retain, 24).mean() - loss_on(forget, 8).clamp(max=8).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def noisy(model: nn.Module, deviation: float, seed: int = 0) -> nn.Module:
    """Gaussian noise on every weight."""
    random = torch.Generator().manual_seed(seed)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * deviation)
    return broken


def within_rounding_cells(
    model: nn.Module, weights: dict[str, nn.Parameter], bits: int, seed: int = 0
) -> None:
    """Move weights within the cells that round to the same code, in place; each row's largest one stays."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights.values():
            flat = weight.flatten(1)
            largest = flat.abs().amax(1, keepdim=True)
            step = largest / (2 ** (bits - 1) - 1)
            moved = (flat / step).round() * step + (
                torch.rand(flat.shape, generator=random) - 0.5
            ) * 0.9 * step
            keep = flat.abs() == largest
            moved = torch.where(keep, flat, moved.clamp(-largest, largest))
            weight.copy_(moved.view(weight.shape))
