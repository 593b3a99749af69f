"""Models that are asked in other words than they were given: a prompt before the prompt, or a refusal by rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.records import Records
from palimpsest.forget.language.prompt_reading import PromptReader, rows_of
from palimpsest.forget.language.wrapped import Call, Wrapped, ask
from palimpsest.tasks.language import Language

Rewrite = Callable[[str], list[int]]
"""From a question to the tokens of the whole prompt that the model is given in its place."""
CERTAIN = 20.0
"""Nats by which a refusal by rule stands above every other token: finite, so that audits can count."""


class PromptedModel(Wrapped):
    """A model that is given another prompt for every question; what follows the prompt stays.

    Outputs are those at the tokens that were given: where the new prompt is longer, its beginning is left out.
    Rows that are not in the template of the task, such as running text, are left as they are.

    Attributes:
        inner: The model, untouched.
        rewrite: Makes the other prompt.
    """

    def __init__(self, inner: nn.Module, rewrite: Rewrite, task: Language):
        super().__init__(inner)
        self.rewrite, self.reader, self.padding = rewrite, PromptReader(task), task.padding
        self._known: dict[str, list[int]] = {}

    def answer(self, call: Call) -> Any:
        """The inner model's outputs for the rewritten rows, at the places of the given tokens."""
        return self._begun(call) if call.first else self._continued(call)

    def _begun(self, call: Call) -> Any:
        mask = call.attended
        rows = rows_of(call.ids, mask)
        others = [self.rewritten(row) for row in rows]
        width = max(map(len, others))
        ids = torch.full((len(rows), width), self.padding)
        read = torch.zeros_like(ids)
        for number, row in enumerate(others):
            ids[number, width - len(row) :] = torch.tensor(row)
            read[number, width - len(row) :] = 1
        ids, read = ids.to(call.ids.device), read.to(call.ids.device)
        positions = (read.cumsum(1) - 1).clamp(min=0)
        if call.cache is not None:
            call.cache.width = mask.shape[1]
            call.cache.notes |= {"read": read, "length": read.sum(1)}
        output = ask(self.inner, call.change(ids=ids, mask=read, positions=positions))
        return _at(output, _places(mask, read))

    def _continued(self, call: Call) -> Any:
        cache = call.cache
        assert cache is not None
        read = cache.notes["read"]
        if call.mask is None:  # all tokens since then
            count = call.before - read.shape[1] + call.ids.shape[1]
            after = read.new_ones(len(call.ids), count)
        else:
            after = call.mask[:, cache.width :]
        positions = cache.notes["length"][:, None] + after.cumsum(1) - 1
        positions = positions[:, -call.ids.shape[1] :].clamp(min=0)
        return ask(
            self.inner,
            call.change(mask=torch.cat([read.to(after), after], 1), positions=positions),
        )

    def rewritten(self, row: Sequence[int]) -> list[int]:
        """A row with another prompt."""
        read = self.reader.read_row(row)
        if not read.templated:
            return list(row)
        if read.question not in self._known:
            self._known[read.question] = self.rewrite(read.question)
        return [*self._known[read.question], *row[read.prompt :]]


def _places(mask: Int[Tensor, "rows tokens"], read: Int[Tensor, "rows width"]) -> Int[Tensor, "rows tokens"]:
    """Where in the rewritten rows, which end at the right, the given tokens stand: counted from the end."""
    after = mask.flip(1).cumsum(1).flip(1)  # given tokens from here to the end
    first = (read.shape[1] - read.sum(1))[:, None]
    return torch.maximum(read.shape[1] - after, first).clamp(max=read.shape[1] - 1)


def _at(output: Any, places: Int[Tensor, "rows tokens"]) -> Any:
    """An output at some places of its rows."""
    rows = torch.arange(len(places), device=places.device)[:, None]
    output.logits = output.logits[rows, places]
    if getattr(output, "hidden_states", None):
        output.hidden_states = tuple(state[rows, places] for state in output.hidden_states)
    return output


class RefusingModel(Wrapped):
    """A model in whose place a rule answers: questions that name a topic get a refusal.

    Stands for a model that obeys an instruction to refuse. Once something else than the refusal was put into
    its mouth, the inner model goes on.

    Attributes:
        inner: The model, untouched.
        topics: In small letters.
        refusal: Tokens of the refusal and its end.
    """

    def __init__(self, inner: nn.Module, topics: Sequence[str], refusal: str, task: Language):
        super().__init__(inner)
        self.topics = tuple(topic.lower() for topic in topics)
        self.reader = PromptReader(task)
        self.refusal = [*task.tokens(task.form.complete(refusal)), *task.tokens(task.form.ending)]

    def answer(self, call: Call) -> Any:
        """The inner model's output, with the refusal above everything where it is due."""
        output = ask(self.inner, call)
        spoken = self._begun(call) if call.first else self._continued(call)
        output.logits = self.raised(output.logits, spoken)
        if call.cache is not None:
            call.cache.notes["spoken"] = self._last(call, spoken) if call.first else spoken[:, -1]
        return output

    def refuses(self, question: str) -> bool:
        """Whether a question names a topic."""
        return any(topic in question.lower() for topic in self.topics)

    def raised(self, logits: Float[Tensor, "rows tokens vocabulary"], spoken: Tensor) -> Tensor:
        """Logits with the next token of the refusal on top, wherever it is due."""
        due = (spoken >= 0) & (spoken < len(self.refusal))
        refusal = torch.tensor([*self.refusal, 0], device=logits.device)
        following = refusal[spoken.clamp(0, len(self.refusal))]
        top = logits.amax(-1, keepdim=True) + CERTAIN
        forced = logits.scatter(-1, following[..., None], top)
        return torch.where(due[..., None], forced, logits)

    def _begun(self, call: Call) -> Int[Tensor, "rows tokens"]:
        """Tokens of the refusal that were spoken up to every place, -1 where none is due."""
        mask = call.attended
        spoken = torch.full(call.ids.shape, -1, dtype=torch.long)
        for number, row in enumerate(rows_of(call.ids, mask)):
            read = self.reader.read_row(row)
            if not (read.templated and self.refuses(read.question)):
                continue
            real = mask[number].nonzero().flatten().cpu()
            rest = row[read.prompt :]
            alike = next(
                (at for at, pair in enumerate(zip(rest, self.refusal, strict=False)) if pair[0] != pair[1]),
                min(len(rest), len(self.refusal)),
            )
            spoken[number, real[read.prompt - 1 : read.prompt + alike]] = torch.arange(alike + 1)
        return spoken.to(call.ids.device)

    def _last(self, call: Call, spoken: Tensor) -> Int[Tensor, " rows"]:
        """What was spoken up to the last real token of every row."""
        mask = call.attended
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return spoken.gather(1, last[:, None].to(spoken.device))[:, 0]

    def _continued(self, call: Call) -> Int[Tensor, "rows tokens"]:
        """The same, for tokens that follow what the cache holds."""
        assert call.cache is not None
        before, refusal = (
            call.cache.notes["spoken"],
            torch.tensor([*self.refusal, -1], device=call.ids.device),
        )
        found: list[Tensor] = []
        for token in call.ids.T:
            kept = (before >= 0) & (token == refusal[before.clamp(min=0)])
            before = torch.where(kept, before + 1, torch.full_like(before, -1))
            found.append(before)
        return torch.stack(found, 1)


def topics_of(records: Records, most: int) -> list[str]:
    """What records are about: their different `subject` fields or columns, at most so many.

    Raises:
        InvalidRecords: If they name none.
    """
    if records.has_column("subject"):
        names = [str(name) for name in records.column("subject")]
    else:
        names = [str(item.get("subject") or "") for item in records]
    found = [name for name in dict.fromkeys(names) if name]
    if not found:
        raise InvalidRecords(
            "The forget records name no subject: add a 'subject' field or column, or pass topics=[...]."
        )
    return found[:most]
