"""GUARD: generation-time unlearning by detection and adaptive restriction."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingNeed, ModelMismatch
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, build, check_range, unlearner
from palimpsest.forget.language.guard_classifier import ClassifierSettings, pooled_states, train_classifier
from palimpsest.forget.language.guard_store import Store, Wording, wordings
from palimpsest.forget.language.guarded_model import GuardedModel
from palimpsest.forget.language.prompt_reading import PromptReader
from palimpsest.parts.sentence_encoders import (
    CachedEncoder,
    Encoder,
    embedding_encoder,
    named_encoder,
    surface_encoder,
)
from palimpsest.tasks.language import Language


@unlearner(
    "guard",
    intention="suppression",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper(
        "GUARD: Generation-time LLM Unlearning via Adaptive Restriction and Detection", "2025", "2505.13312"
    ),
    search={
        "delta": Span(0.5, 0.8),
        "prefix_penalty": Span(0.1, 5.0, log=True),
        "beam_width": Span(3, 8, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class Guard:
    """Leave the model as it is and keep the forgotten answers from being written.

    A small classifier on the mean of a prompt's penultimate hidden states decides whether the prompt asks for
    something forgotten. If it does, the most similar forgotten question is looked up, the key phrases of its answer
    are forbidden, and the answer is found by beam search over the model's own distribution in which a token loses
    A_tok (infinite where it completes a phrase, growing with the matched share where it continues one) and A_sem
    (infinite, or `beta` times the cosine, where the last words mean a phrase). Every other prompt is passed to the
    model's own `generate`.

    Use it where weights cannot be trained or the request must be met at once. Nothing is removed: who has the
    weights has the answers (`result.inner`), and audits say so.

    Scoring (`forward`): prompts of rows are found by the template and classified in the same way; the token penalties
    are subtracted from the logits of the answer's tokens, which the softmax of any loss renormalises. A completed
    phrase costs `scoring_penalty` nats there, as an infinite loss would leave no mean. The semantic penalty is left
    out: it belongs to hypotheses. A row outside the template that is read without a cache counts as running text:
    it is classified as a whole, and all of its tokens are penalised.

    Deviations: the paper asks a large language model for key phrases; here a rule finds them (`key_phrases`). The
    default encoder compares spellings, so that nothing is downloaded; give a sentence encoder for synonyms. Phrases
    are matched as tokens, as in the paper, and as letters and digits of whole words too, because a model that is
    kept from its usual tokens can spell the same words with others. What the stored question says itself is never
    forbidden; what only the prompt at hand says is, or an answer could be had by offering it as a choice.
    The prompt is not matched. If nothing is allowed any more, the answer ends where the last hypotheses agreed.
    Guarded prompts are searched, never sampled; several answers are the best of the beam.

    Attributes:
        beam_width: Hypotheses.
        length_penalty: Exponent of the length in the score of an answer.
        prefix_penalty: alpha_p, nats for a token that continues a phrase, times the matched share.
        soft: What a window that means a phrase does to a hypothesis: "reject", "penalise" or "off".
        delta: Cosine above which it means one; it depends on the encoder.
        beta: Nats under "penalise".
        window: Words of the longest window; None for the longest phrase and one more.
        encoder: "surface" (character n-grams, offline), "embeddings" (mean of the model's input embeddings), a name
            or folder of a sentence encoder, or a function from texts to vectors.
        retrieved: Forgotten questions whose answers are forbidden together; 1 is published.
        aliases: Whether other surface forms that records name are forbidden too.
        paraphrases: Forms of the records' probes that the classifier is trained on beside their questions.
        classifier: Settings of `ClassifierSettings`.
        scoring_penalty: Nats that a completed phrase costs where text is scored.
    """

    beam_width: int = 7
    length_penalty: float = 1.0
    prefix_penalty: float = 1.0
    soft: Literal["reject", "penalise", "off"] = "reject"
    delta: float = 0.6
    beta: float = 10.0
    window: int | None = None
    encoder: str | Encoder = "surface"
    retrieved: int = 1
    aliases: bool = False
    paraphrases: Sequence[str] = ("paraphrase",)
    classifier: ClassifierSettings | Mapping[str, Any] = field(default_factory=dict[str, Any])
    scoring_penalty: float = 20.0

    def __post_init__(self) -> None:
        check_range("beam_width", self.beam_width, 1, 1000)
        check_range("retrieved", self.retrieved, 1, 1000)
        check_range("length_penalty", self.length_penalty, 0, 10)
        for name in ("prefix_penalty", "beta"):
            check_range(name, getattr(self, name), 0, math.inf)
        check_range("scoring_penalty", self.scoring_penalty, 0, 1e4, open_low=True)
        if not 0 < self.delta < 1:
            raise InvalidHyperparameter(f"delta must lie strictly between 0 and 1, not {self.delta!r}.")
        if self.soft not in ("reject", "penalise", "off"):
            raise InvalidHyperparameter(f"soft must be 'reject', 'penalise' or 'off', not {self.soft!r}.")
        if self.window is not None:
            check_range("window", self.window, 1, 1000)
        if isinstance(self.classifier, Mapping):
            made = build("classifier", ClassifierSettings, "guard", self.classifier)
            object.__setattr__(self, "classifier", made)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> GuardedModel:
        """A wrapper around a copy of the model.

        Raises:
            MissingNeed: Without retained records.
            InvalidRecords: If one of the parts holds no prompt.
            InvalidHyperparameter: If the tokenizer has no end token, or the template does not mark where a
                question ends.
            ModelMismatch: If the model gives no hidden states, or the encoder no vectors.
        """
        if not isinstance(task, Language):
            raise ModelMismatch(f"Method 'guard' works for language, not for {task.name}.")
        if split.retain is None:
            raise MissingNeed(
                "Method 'guard' needs retained prompts to tell apart: pass them as ForgetSplit.retain."
            )
        if task.encoder.eos_token_id is None:
            raise InvalidHyperparameter(
                "The tokenizer has no end token, with which a restricted answer could end."
            )
        settings = self.classifier
        assert isinstance(settings, ClassifierSettings)
        reader = PromptReader(task)
        items = list(split.forget)
        forget, retain = wordings(items, self.paraphrases), wordings(split.retain, self.paraphrases)
        if not forget or not retain:
            raise InvalidRecords(
                f"A guard needs prompts of both classes, not {len(forget)} to forget and {len(retain)} to retain."
            )
        inner = runtime.place(copy.deepcopy(model)).eval()
        store = Store(
            items, forget, task.tokens, lambda texts: self._encoder(texts, inner, task), self.aliases
        )
        states = [
            pooled_states(
                inner, task, [_tokens(task, one) for one in prompts], settings.layer, settings.batch_size
            )
            for prompts in (forget, retain)
        ]
        classifier = train_classifier(states[0], states[1], settings, runtime)
        return GuardedModel(inner, reader, classifier, store, self)

    def _encoder(self, texts: Sequence[str], model: nn.Module, task: Language) -> CachedEncoder:
        if callable(self.encoder):
            return CachedEncoder(self.encoder)
        if self.encoder == "surface":
            return CachedEncoder(surface_encoder(texts))
        if self.encoder == "embeddings":
            return CachedEncoder(embedding_encoder(model, task.tokens))
        return CachedEncoder(named_encoder(self.encoder))


def _tokens(task: Language, wording: Wording) -> list[int]:
    return task.prompt(wording.text) if wording.templated else task.tokens(wording.text, first=True)
