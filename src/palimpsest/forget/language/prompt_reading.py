"""Which question do rows of tokens ask, and where does their prompt end? For wrappers, which see tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.tasks.language import Language


@dataclass(frozen=True)
class Read:
    """What a row of tokens was found to be.

    Attributes:
        question: Within the template; of a row that is not in the template, its whole text.
        prompt: Number of tokens of the prompt, padding on the left not counted; of a row that is not in the
            template, all of its tokens.
        templated: Whether the row is in the template.
    """

    question: str
    prompt: int
    templated: bool


class PromptReader:
    """Finds questions in rows of tokens by the template of a task.

    Args:
        task: Whose template and tokenizer the rows were made with.

    Raises:
        InvalidHyperparameter: If nothing stands between question and answer in the template, so that nobody
            could tell where the one ends.
    """

    def __init__(self, task: Language):
        before, _, after = task.form.prompt.partition("{question}")
        if not after.strip():
            raise InvalidHyperparameter(
                f"Under the template '{task.form.name}' nothing marks the end of a question, so a wrapper cannot tell it "
                "from the answer: use template='plain' or another with words between the two."
            )
        self.task, self.before, self.after = task, before.strip(), after.rstrip(" ")
        self._known: dict[tuple[int, ...], Read] = {}

    def read(self, ids: Tensor, mask: Tensor) -> list[Read]:
        """What every row asks.

        Args:
            ids: Tokens, [rows, tokens].
            mask: 1 for tokens that are read, [rows, tokens].
        """
        return [self.read_row(row) for row in rows_of(ids, mask)]

    def read_row(self, row: Sequence[int]) -> Read:
        """What one row, without padding, asks."""
        key = tuple(row)
        if key not in self._known:
            if len(self._known) > 20_000:
                self._known.clear()
            self._known[key] = self._read(list(row))
        return self._known[key]

    def _read(self, row: list[int]) -> Read:
        encoder: Any = self.task.encoder
        text = encoder.decode(row, skip_special_tokens=False)
        start = text.find(self.before)
        rest = text[start + len(self.before) :] if start >= 0 else ""
        for question in _candidates(rest, self.after):
            prompt = self.task.prompt(question)
            if row[: len(prompt)] == prompt:
                return Read(question, len(prompt), True)
        return Read(encoder.decode(row, skip_special_tokens=True).strip(), len(row), False)


def rows_of(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The tokens of every row that are read, without padding."""
    return [
        [token for token, kept in zip(row, real, strict=True) if kept]
        for row, real in zip(ids.tolist(), mask.tolist(), strict=True)
    ]


def _candidates(text: str, after: str) -> list[str]:
    """Questions that the text may begin with: up to every place where the template goes on, longest first."""
    found: list[str] = []
    at = text.find(after)
    while at >= 0:
        piece = text[:at]
        found += [piece.strip(), piece, piece.removeprefix(" ")]
        at = text.find(after, at + 1)
    return list(dict.fromkeys(reversed(found)))
