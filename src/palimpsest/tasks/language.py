"""Language: answers to questions and running text, by any causal language model of Hugging Face's kind."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidLabels,
    InvalidRecords,
    InvalidSplit,
    ModelMismatch,
    shorten,
)
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Observation
from palimpsest.parts.scored_head import head_at
from palimpsest.parts.templates import PLAIN_WORDS, Template, template_of
from palimpsest.parts.tokens import (
    IGNORED,
    check_tokens,
    mean_losses,
    row_means,
    scored,
    scored_losses,
)
from palimpsest.tasks._checking import first_outputs
from palimpsest.tasks.generating import generate
from palimpsest.tasks.registry import task
from palimpsest.tasks.scoring import Scores, at_positions, last_prompt, observed_tokens, score

TEMPLATE_ATTRIBUTE = "palimpsest_template"
"""Of a model (or of its config, where `save_pretrained` keeps it): fingerprint of the template it was trained under."""
LOOKED_AT = 16
"""Records that templates are compared on."""
CLEARLY = 0.25
"""A template under which answers lose so many nats per token less than under the task's is worth a warning."""


@task("language")
@dataclass(frozen=True)
class Language:
    """Causal language modelling with masked prompts.

    A record has a `question` and an `answer` (TOFU's names), or a `text`. Questions are put into the
    template; only the answer and the token that ends it are learned and scored. Of running text every
    token is (after a beginning token, if the tokenizer has one).

    Prompt and answer are tokenized together where the tokens of the prompt stay the same, and one after the
    other where they would not: the model is scored on the very tokens that it would have to generate.

    Attributes:
        tokenizer: A Hugging Face tokenizer, the name or folder of one, or "data": a small one of byte pairs
            that is made from the texts of the data.
        template: "auto", "chat", "plain", "bare" or a text with {question} and {answer} (see
            `palimpsest.parts.templates.template_of`).
        system: System turn of a chat template.
        max_length: Longest sequence in tokens; the tokenizer's or the model's own by default.
        vocabulary: Size of the tokenizer that "data" makes.
        verify_template: Whether `check` compares the template with the one that the model was trained under,
            and says so where another fits clearly better.
    """

    tokenizer: Any = "data"
    template: str = "auto"
    system: str | None = None
    max_length: int | None = None
    vocabulary: int = 2000
    verify_template: bool = True
    _cache: dict[tuple[str, str], tuple[list[int], int]] = field(
        default_factory=dict[tuple[str, str], tuple[list[int], int]], init=False, repr=False, compare=False
    )

    @property
    def name(self) -> str:
        """Short name of the domain."""
        return "language"

    @property
    def fits_whole(self) -> bool:
        """It is fitted to all records: see `build_task`."""
        return True

    @property
    def labelled(self) -> bool:
        """Whether every record holds its own labels: what is to be said is the answer, or the text."""
        return True

    def fitted(self, records: Records) -> Language:
        """The same task with its tokenizer loaded, or made from the texts of records."""
        if self.tokenizer != "data":
            _ = self.encoder
            return self
        from palimpsest.parts.byte_pairs import byte_pair_tokenizer

        return replace(
            self, tokenizer=byte_pair_tokenizer([*texts_of(records), PLAIN_WORDS], self.vocabulary)
        )

    def outputs(self, records: Records) -> int:
        """Number of outputs of a model for this task: the size of the vocabulary."""
        return len(self.encoder)

    @cached_property
    def encoder(self) -> Any:
        """The tokenizer itself."""
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        if self.tokenizer == "data":
            raise InvalidHyperparameter(
                "The tokenizer 'data' is made by Language().fitted(records): fit the task, or name a tokenizer."
            )
        from palimpsest.parts.tokenizers import load_tokenizer

        return load_tokenizer(self.tokenizer)

    @cached_property
    def form(self) -> Template:
        """The template."""
        return template_of(self.encoder, self.template, self.system)

    def mark(self, model: nn.Module) -> None:
        """Note the template on a model that was trained under it, and in its config, which is saved with it."""
        for owner in (model, getattr(model, "config", None)):
            if owner is not None:
                setattr(owner, TEMPLATE_ATTRIBUTE, self.form.fingerprint)

    def describe(self) -> dict[str, Any]:
        """What a run must record: template, tokenizer and limits."""
        return {
            "template": self.form.describe(),
            "tokenizer": getattr(self.encoder, "name_or_path", "") or type(self.encoder).__name__,
            "vocabulary": len(self.encoder),
        }

    def encode(self, question: str | None, answer: str) -> tuple[list[int], int]:
        """Tokens of a record, and how many of them are the prompt.

        Args:
            question: None for running text.
            answer: The answer, or the text.
        """
        key = ("\0" if question is None else question, answer)
        if key not in self._cache:
            self._cache[key] = self._text(answer) if question is None else self._pair(question, answer)
        return self._cache[key]

    def prompt(self, question: str) -> list[int]:
        """Tokens of the prompt of a question."""
        return self.tokens(self.form.render(question), first=True)

    def _pair(self, question: str, answer: str) -> tuple[list[int], int]:
        prompt, completed = self.prompt(question), self.form.complete(answer)
        if not answer.strip():
            return prompt, len(prompt)
        whole = self.tokens(self.form.render(question) + completed, first=True)
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            whole = [*prompt, *self.tokens(completed)]
        return [*whole, *self.tokens(self.form.ending)], len(prompt)

    def _text(self, text: str) -> tuple[list[int], int]:
        tokens, end = self.tokens(text, first=True), self.encoder.eos_token_id
        prompt = int(tokens[:1] == [self.encoder.bos_token_id])
        if not text.strip() or end is None:
            return tokens, prompt if text.strip() else len(tokens)
        return [*tokens, end], prompt

    def tokens(self, text: str, first: bool = False) -> list[int]:
        """Tokens of a text; the first of a sequence begins with the beginning token, if there is one."""
        tokens = self.encoder(text, add_special_tokens=False)["input_ids"]
        beginning = self.encoder.bos_token_id
        if first and beginning is not None and tokens[:1] != [beginning]:
            return [beginning, *tokens]
        return tokens

    def lengths(self, records: Records) -> list[int]:
        """Number of tokens of every record, prompt and answer together."""
        return [len(self.encode(item.get("question"), _answer(item))[0]) for item in records]

    def collate(self, items: Sequence[dict[str, Any]]) -> Batch:
        """Tokens, mask and labels, padded on the right; other fields as lists."""
        rows = [self.encode(item.get("question"), _answer(item)) for item in items]
        keys = dict.fromkeys(key for item in items for key in item)
        batch: Batch = {key: [item.get(key) for item in items] for key in keys}
        batch.update(self.padded([ids for ids, _ in rows], [start for _, start in rows]))
        if "index" in batch:
            batch["index"] = torch.tensor(batch["index"])
        return batch

    def padded(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> dict[str, Tensor]:
        """Rows of tokens as `input_ids`, `attention_mask` and `labels`, of which the first `starts` are prompt."""
        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        labels = [row.clone() for row in ids]
        for row, start in zip(labels, starts, strict=True):
            row[:start] = IGNORED
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.padding),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    @property
    def padding(self) -> int:
        """Token of padding; any will do, because it is masked wherever it stands."""
        for token in (self.encoder.pad_token_id, self.encoder.eos_token_id, 0):
            if token is not None:
                return int(token)
        return 0

    @property
    def stops(self) -> list[int]:
        """Tokens that end an answer."""
        ending, end = self.tokens(self.form.ending), self.encoder.eos_token_id
        return sorted({int(ending[-1])} | ({int(end)} if end is not None else set()))

    def logits(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch tokens vocabulary"]:
        """Outputs at every position, with their graph."""
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return getattr(output, "logits", output)

    def loss_of_logits(
        self, logits: Float[Tensor, "batch tokens vocabulary"], batch: Batch
    ) -> Float[Tensor, " batch"]:
        """Mean loss of the answer's tokens, per record, in nats."""
        return mean_losses(logits, batch["labels"])

    def loss_per_example(self, model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """Mean loss of the answer's tokens, per record, in nats, with its graph."""
        return row_means(self.token_losses(model, batch), batch["labels"])

    def token_losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch tokens-1"]:
        """-log p of every labelled token, in nats, 0 where there is no label, with its graph.

        The same as `palimpsest.parts.tokens.token_losses` of the logits, without those of prompts and padding
        wherever a model's head can be kept from making them.
        """
        return scored_losses(_scored_rows(model, batch)[0], batch["labels"])

    def features(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch dim"]:
        """Input of the head where the first token of the answer is predicted, with its graph."""
        output = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        )
        return at_positions(output.hidden_states[-1], last_prompt(batch["labels"]))

    @torch.no_grad()
    def observe(self, model: nn.Module, batch: Batch) -> Observation:
        """Losses, per-token measurements and hidden states of a batch in one forward pass.

        `logits` of the observation are the log-probabilities of the labelled tokens, [batch, tokens]: those of
        the whole vocabulary would not fit. `tokens` has more of them, each [batch, tokens]: "mask", "right"
        (the likeliest token is the labelled one), "mean" and "deviation" of the log-probability over the
        vocabulary.
        """
        labels = batch["labels"]
        rows, output = _scored_rows(model, batch, output_hidden_states=True)
        losses = scored_losses(rows, labels)
        tokens = observed_tokens(rows.float(), labels)
        at = last_prompt(labels)
        hidden = output.hidden_states or ()
        layers = {
            f"block {number}": at_positions(state, at).float() for number, state in enumerate(hidden[1:-1])
        }
        return Observation(
            tokens["log_probability"],
            row_means(losses, labels),
            at_positions(hidden[-1], at).float() if hidden else None,
            layers,
            tokens,
        )

    def check(self, model: nn.Module, records: Records, labels: bool = True) -> None:
        """Check texts, lengths, vocabularies and templates, before any work.

        Raises:
            InvalidRecords: For a record without question and answer, or one that is too long.
            InvalidLabels: For an answer that tokenizes to nothing.
            ModelMismatch: If model and tokenizer have different vocabularies, the model was trained under
                another template, or its outputs are not [batch, tokens, vocabulary].
        """
        longest = self._longest(model)
        for item in records:
            self._check_item(item, longest)
        self._check_vocabulary(model, records)
        batch = self.collate([records[int(at)] for at in range(min(4, len(records)))])
        logits = first_outputs(model, batch, "input_ids", lambda moved: self.logits(model, moved))
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelMismatch(f"A language model gives logits [batch, tokens, vocabulary], not {shape}.")
        if torch.isnan(logits).any():
            raise ModelMismatch("The model gives NaN logits.")
        if self.verify_template:
            self._check_template(model, records)

    def check_split(self, split: ForgetSplit) -> None:
        """Check that no text is to be forgotten and retained at once.

        Raises:
            InvalidSplit: Naming the first records that are.
        """
        if split.retain is None:
            return
        kept = {_content(item): str(item["id"]) for item in split.retain}
        both = [(str(item["id"]), kept[_content(item)]) for item in split.forget if _content(item) in kept]
        if both:
            raise InvalidSplit(
                f"{len(both)} records to forget have the same text as retained ones: {shorten(both, 3)}. Forget both, or none."
            )

    def _longest(self, model: nn.Module) -> int:
        config = getattr(model, "config", None)
        limits = [self.max_length, getattr(config, "max_position_embeddings", None)]
        known = [int(limit) for limit in limits if limit]
        return min(known) if known else 1 << 30

    def _check_item(self, item: Mapping[str, Any], longest: int) -> None:
        name = item["id"]
        if not isinstance(item.get("text"), str) and not (
            isinstance(item.get("question"), str) and isinstance(item.get("answer"), str)
        ):
            have = sorted(set(item) - {"id", "index"})
            raise InvalidRecords(
                f"Record {name!r} has neither a text nor a question and an answer as texts (it has {have})."
            )
        ids, start = self.encode(item.get("question"), _answer(item))
        if len(ids) <= max(start, 1):
            raise InvalidLabels(f"The answer of record {name!r} tokenizes to nothing: {_answer(item)!r}.")
        if len(ids) > longest:
            what = "The question" if start >= longest else "The record"
            raise InvalidRecords(
                f"{what} of record {name!r} has {len(ids)} tokens, the context has {longest}: shorten it, or cut "
                "running text into pieces."
            )

    def _check_vocabulary(self, model: nn.Module, records: Records) -> None:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if embedding is None:
            return
        size, known = int(embedding.weight.shape[0]), len(self.encoder)
        if known > size:
            raise ModelMismatch(
                f"The tokenizer knows {known} tokens, the model embeds {size}: they do not belong together."
            )

    def _check_template(self, model: nn.Module, records: Records) -> None:
        recorded = template_recorded(model)
        if recorded and recorded != self.form.fingerprint:
            raise ModelMismatch(
                f"The model was trained under the template {recorded}, the task uses '{self.form.name}' "
                f"({self.form.fingerprint}): set template= as in training, or verify_template=False if this is meant."
            )
        if recorded:
            return
        losses = self.compare_templates(model, records)
        own = losses.get(self.form.name)
        best = min(losses, key=lambda name: losses[name], default="")
        if own is not None and losses[best] < own - CLEARLY:
            warnings.warn(
                f"Answers are likelier under the template '{best}' ({losses[best]:.2f} nats per token) than under "
                f"'{self.form.name}' ({own:.2f}): the model may have been trained with it. Set template='{best}'.",
                stacklevel=3,
            )

    def compare_templates(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Mean loss per answer token under every template that the tokenizer allows, by name.

        A model knows the answers best under the template that it was trained with. Only the first
        `LOOKED_AT` questions are asked; nothing where there are none.
        """
        items = [item for _, item in zip(range(LOOKED_AT * 4), records, strict=False) if "question" in item]
        items = [item for item in items if item.get("question") is not None][:LOOKED_AT]
        if not items:
            return {}
        names = dict.fromkeys(("plain", "bare", *(("chat",) if self.encoder.chat_template else ())))
        asked = {name: replace(self, template=name, system=None) for name in names}
        asked[self.form.name] = self
        place = next(model.parameters()).device
        losses: dict[str, float] = {}
        with torch.no_grad(), evaluating(model):
            for name, variant in asked.items():
                batch = variant.collate(items)
                moved = {key: v.to(place) if isinstance(v, Tensor) else v for key, v in batch.items()}
                losses[name] = float(variant.loss_per_example(model, moved).mean())
        return losses

    @torch.no_grad()
    def generate(self, model: nn.Module, questions: Sequence[str], **settings: Any) -> list[list[str]]:
        """Answers of a model to questions, without prompt and ending: see `palimpsest.tasks.generating.generate`."""
        return generate(self, model, questions, **settings)

    @torch.no_grad()
    def score(
        self, model: nn.Module, questions: Sequence[str], answers: Sequence[Sequence[str]], **settings: Any
    ) -> list[Scores]:
        """What a model gives to several answers of each question, with one pass over every question.

        See `palimpsest.tasks.scoring.score`.
        """
        return score(self, model, questions, answers, **settings)


def _scored_rows(
    model: nn.Module, batch: Batch, **further: Any
) -> tuple[Float[Tensor, "scored vocabulary"], Any]:
    """The logits that predict the labelled tokens, in the order of rows and positions, and the whole output."""
    labels = batch["labels"]
    chosen = scored(labels)
    with head_at(model, F.pad(chosen, (0, 1))):
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **further)
    logits: Tensor = getattr(output, "logits", output)
    if logits.dim() == 2:
        return logits, output
    check_tokens(logits, labels)
    return logits[:, :-1][chosen], output


def plain_questions(records: Records) -> NDArray[np.int64]:
    """Positions of the records that ask for a fact plainly: those of form "qa", else all with a question.

    Other forms of the same facts (cloze, reversed, running text) are trained on beside them; counting
    each as a fact of its own would count facts several times.

    Raises:
        InvalidRecords: If there is no question among them.
    """
    asked = np.array([item.get("question") is not None for item in records], bool)
    if records.has_column("form") and (records.column("form") == "qa").any():
        asked &= records.column("form") == "qa"
    if not asked.any():
        raise InvalidRecords("None of the records has a question: their facts cannot be asked for.")
    return np.flatnonzero(asked)


def texts_of(records: Records) -> list[str]:
    """All texts of records, for a tokenizer to be made from."""
    texts: list[str] = []
    for item in records:
        for key in ("text", "question", "answer"):
            if isinstance(item.get(key), str):
                texts.append(item[key])
    return texts


def template_recorded(model: nn.Module) -> str:
    """Fingerprint of the template that a model was trained under, or empty."""
    config = getattr(model, "config", None)
    return str(getattr(model, TEMPLATE_ATTRIBUTE, "") or getattr(config, TEMPLATE_ATTRIBUTE, "") or "")


def _answer(item: Mapping[str, Any]) -> str:
    return item["text"] if item.get("question") is None else item["answer"]


def _content(item: Mapping[str, Any]) -> tuple[str, str]:
    return (item.get("question") or "", _answer(item))
