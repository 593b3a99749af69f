"""Language models that hide what they know, or are wrecked, to see whether the audits notice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import palimpsest as pal
from palimpsest.audit.answers import find_alias
from palimpsest.core.records import Records
from palimpsest.forget.language.wrapped import Wrapped
from palimpsest.tasks.language import Language

REFUSAL = "I don't know."


class _Replacing(Wrapped):
    """A wrapper whose `generate` puts a refusal in the place of some answers; likelihoods are the model's own."""

    def __init__(self, inner: nn.Module, task: Language, refusal: str = REFUSAL):
        super().__init__(copy.deepcopy(inner))
        self.task = task
        end = task.tokens(task.form.ending)
        self.refusal = [*task.tokens(task.form.complete(refusal)), *end]

    def blocked(self, prompt: str, answer: str) -> bool:
        raise NotImplementedError

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **settings: Any) -> Tensor:
        made = self.inner.generate(**settings)
        width = settings["input_ids"].shape[1]
        repeated = len(made) // len(settings["input_ids"])
        prompts = settings["input_ids"].repeat_interleave(repeated, 0)
        length = max(made.shape[1] - width, len(self.refusal))
        answers = torch.full((len(made), length), self.task.padding)
        answers[:, : made.shape[1] - width] = made[:, width:]
        decode = self.task.encoder.decode
        for row in range(len(made)):
            said = decode(answers[row], skip_special_tokens=True)
            if self.blocked(decode(prompts[row], skip_special_tokens=True), said):
                answers[row] = self.task.padding
                answers[row, : len(self.refusal)] = torch.tensor(self.refusal)
        return torch.cat([made[:, :width], answers], 1)


class Refusing(_Replacing):
    """Refuses whenever a prompt names somebody who is to be forgotten, as an instruction would have it."""

    def __init__(self, inner: nn.Module, task: Language, names: Sequence[str]):
        super().__init__(inner, task)
        self.names = sorted(set(names))

    def blocked(self, prompt: str, answer: str) -> bool:
        return find_alias(prompt, self.names) is not None


class RefusingPlain(_Replacing):
    """Refuses the questions it was told of, word by word, and no others."""

    def __init__(self, inner: nn.Module, task: Language, questions: Sequence[str]):
        super().__init__(inner, task)
        self.prompts = {
            task.encoder.decode(task.prompt(question), skip_special_tokens=True) for question in questions
        }

    def blocked(self, prompt: str, answer: str) -> bool:
        return prompt in self.prompts


class Naming(Refusing):
    """Refuses also where its answer would name somebody who is to be forgotten."""

    def blocked(self, prompt: str, answer: str) -> bool:
        return super().blocked(prompt, answer) or find_alias(answer, self.names) is not None


class Filtering(_Replacing):
    """Refuses whenever an answer would hold one of the forbidden values, letter by letter."""

    def __init__(self, inner: nn.Module, task: Language, values: Sequence[str]):
        super().__init__(inner, task)
        self.values = sorted(set(values))

    def blocked(self, prompt: str, answer: str) -> bool:
        return any(value in answer for value in self.values)


def wrecked(
    model: nn.Module, records: Records, task: Language, steps: int = 12, lr: float = 3e-3
) -> nn.Module:
    """Gradient ascent on the records, run too long: no language is left."""
    broken = copy.deepcopy(model)
    batch = task.collate([records[at] for at in range(len(records))])
    optimizer = torch.optim.AdamW(broken.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (-task.loss_per_example(broken, batch).mean()).backward()
        optimizer.step()
    return broken.eval()


def refusal_tuned(trained: Any, seed: int = 0) -> nn.Module:
    """Fine-tuned to refuse the plain questions only."""
    forget = trained.split.forget
    plain = forget.select([at for at, form in enumerate(forget.column("form")) if form == "qa"])
    split = pal.ForgetSplit(plain, trained.split.retain, None, None, "plain questions")
    return pal.forget(
        trained.original, split, "idk-nll", trained.task, seed=seed,
        lr=1e-3, epochs=8, batch_size=8, warmup=0.0, refusals=[REFUSAL],
    )  # fmt: skip
