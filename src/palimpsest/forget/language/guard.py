"""GUARD: generation-time unlearning by detection and adaptive restriction."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingNeed, ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, build, check_range, unlearner
from palimpsest.forget.language.guard_classifier import (
    ClassifierSettings,
    PromptClassifier,
    pool,
    pooled_states,
    states_of,
    train_classifier,
)
from palimpsest.forget.language.guard_store import Forbidden, Matching, Store, Wording, wordings
from palimpsest.forget.language.prompt_reading import PromptReader, Read, rows_of
from palimpsest.forget.language.wrapped import Call, Wrapped, ask
from palimpsest.parts.beam_search import Hypothesis, Restriction, Search, Tokens, beam_search
from palimpsest.parts.constrained import START, penalised
from palimpsest.parts.sentence_encoders import (
    CachedEncoder,
    Encoder,
    embedding_encoder,
    named_encoder,
    surface_encoder,
)
from palimpsest.parts.tokens import token_mean
from palimpsest.tasks.language import Language

ENTRY, STATE = "guard-entry", "guard-state"
"""Notes on the rows of a cache: which phrases are forbidden (-1 for none), and how far they are matched."""
UNUSED = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model")


@unlearner(
    "guard",
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


class GuardedModel(Wrapped):
    """A language model that does not write what was forgotten.

    `generate` takes what transformers' takes; of the settings, guarded prompts heed max_new_tokens (or max_length),
    num_return_sequences, eos_token_id, pad_token_id and streamer.

    A streamer gets a token as soon as it is certain: when all hypotheses that may still win share it.

    Args:
        inner: The model, unchanged.
        reader: Finds questions in tokens.
        classifier: Of prompts.
        store: Of forgotten questions.
        settings: Of the method.
    """

    def __init__(
        self,
        inner: nn.Module,
        reader: PromptReader,
        classifier: PromptClassifier,
        store: Store,
        settings: Guard,
    ):
        super().__init__(inner)
        self.classifier = classifier
        self.reader, self.store, self.settings = reader, store, settings
        self.matching = Matching(settings.soft, settings.delta, settings.beta, settings.window)
        self._entries: list[Forbidden] = []

    @property
    def task(self) -> Language:
        """Whose template and tokenizer the prompts have."""
        return self.reader.task

    @torch.no_grad()
    def probabilities(self, questions: Sequence[str]) -> Float[Tensor, " questions"]:
        """That questions ask for something forgotten."""
        layer, size = self._classifier_settings.layer, self._classifier_settings.batch_size
        prompts = [self.task.prompt(question) for question in questions]
        return self.classifier.probability(pooled_states(self.inner, self.task, prompts, layer, size))

    def guards(self, questions: Sequence[str]) -> list[bool]:
        """Whether each question takes the restricted path."""
        return (self.probabilities(questions) > self.classifier.threshold).tolist()

    def forbidden(self, question: str) -> Forbidden:
        """What must not be said to a question, if it is guarded."""
        return self.store.forbidden(question, self.settings.retrieved)

    @property
    def _classifier_settings(self) -> ClassifierSettings:
        settings = self.settings.classifier
        assert isinstance(settings, ClassifierSettings)
        return settings

    def answer(self, call: Call) -> Any:
        """The inner model's output with the token penalties on rows that ask for something forgotten."""
        labels = call.further.get("labels")
        further = {key: value for key, value in call.further.items() if key != "labels"}
        shown = further.get("output_hidden_states")
        if call.first:
            output = ask(self.inner, call.change(further={**further, "output_hidden_states": True}))
            self._begin(call, output)
            if not shown:
                output.hidden_states = None
        else:
            output = ask(self.inner, call.change(further=further))
            self._continue(call, output)
        if labels is not None:
            output.loss = token_mean(output.logits, labels)
        return output

    def _begin(self, call: Call, output: Any) -> None:
        """Classify the rows and penalise what follows their prompts."""
        mask = call.attended
        reads = self.reader.read(call.ids, mask)
        entries = self._decisions(output, mask, reads)
        places, states, last = [], [], []
        for row, (tokens, read, entry) in enumerate(
            zip(rows_of(call.ids, mask), reads, entries, strict=True)
        ):
            state = START
            if entry >= 0:
                machine = self._entries[entry].machine
                begin = read.prompt if read.templated or call.cache is not None else 0
                own = torch.nonzero(mask[row])[:, 0].tolist()
                before = machine.states(tokens[begin:])
                state = machine.run(tokens[begin:])
                for at, held in zip(
                    own[max(begin - 1, 0) :], (before if begin else before[1:]) + [state], strict=True
                ):
                    places.append((row, at, entry))
                    states.append(held)
            last.append(state)
        self._penalise(output, places, states)
        self._note(call, entries, last)

    def _continue(self, call: Call, output: Any) -> None:
        """Penalise what follows rows whose beginning lies in the cache."""
        assert call.cache is not None
        entries, held = (call.cache.notes[name].tolist() for name in (ENTRY, STATE))
        mask = call.attended[:, -call.ids.shape[1] :]
        places, states = [], []
        for row, entry in enumerate(entries):
            if entry < 0:
                continue
            for at, (token, real) in enumerate(zip(call.ids[row].tolist(), mask[row].tolist(), strict=True)):
                if real:
                    held[row] = self._entries[entry].machine.step(held[row], token)
                    places.append((row, at, entry))
                    states.append(held[row])
        self._penalise(output, places, states)
        self._note(call, entries, held)

    def _penalise(self, output: Any, places: list[tuple[int, int, int]], states: list[int]) -> None:
        if not places:
            return
        rows, at, _ = (torch.tensor(each, device=output.logits.device) for each in zip(*places, strict=True))
        machines = [self._entries[entry].machine for _, _, entry in places]
        prefix, complete = self.settings.prefix_penalty, self.settings.scoring_penalty
        logits = output.logits.clone()
        logits[rows, at] = penalised(output.logits[rows, at], machines, states, prefix, complete)
        output.logits = logits

    def _note(self, call: Call, entries: list[int], states: list[int]) -> None:
        if call.cache is not None:
            call.cache.notes[ENTRY] = torch.tensor(entries, device=call.ids.device)
            call.cache.notes[STATE] = torch.tensor(states, device=call.ids.device)

    def _decisions(self, output: Any, mask: Int[Tensor, "rows tokens"], reads: Sequence[Read]) -> list[int]:
        """For every row the number of what is forbidden in it, -1 for nothing."""
        with torch.no_grad():
            hidden = states_of(output, self._classifier_settings.layer).float()
            lengths = torch.tensor([read.prompt for read in reads], device=mask.device)[:, None]
            prompts = mask.bool() & (mask.cumsum(1) <= lengths)
            guarded: Bool[Tensor, " rows"] = self.classifier.decides(pool(hidden, prompts.long()))
        return [
            self._number(self.forbidden(read.question)) if one else -1
            for read, one in zip(reads, guarded.tolist(), strict=True)
        ]

    def _number(self, forbidden: Forbidden) -> int:
        for number, known in enumerate(self._entries):
            if known is forbidden:
                return number
        self._entries.append(forbidden)
        return len(self._entries) - 1

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **settings: Any) -> Any:
        """Write on: the inner model's own `generate`, except where a prompt asks for something forgotten.

        Args:
            inputs: Tokens of the prompts, padded on the left; `input_ids` is the same.
            **settings: As transformers has them.

        Returns:
            Prompts and answers, [rows, tokens]; for batches without guarded prompts whatever the inner model gives.

        Raises:
            InvalidHyperparameter: If a guarded prompt is to be answered with more than tokens
                (`return_dict_in_generate`).
            ModelMismatch: If a cache is given: what a prompt asks must be seen.
        """
        ids = settings.get("input_ids") if inputs is None else inputs
        if ids is None:
            raise ModelMismatch("A guard needs the tokens of prompts: pass input_ids.")
        mask = self._mask(ids, settings)
        with evaluating(self.inner):
            output = self.inner(
                input_ids=ids, attention_mask=mask, output_hidden_states=True, **self._places(mask)
            )
            entries = self._decisions(output, mask, self.reader.read(ids, mask))
            if max(entries) < 0:
                return self.inner.generate(inputs, **settings)  # pyright: ignore[reportCallIssue]
            return self._guarded(ids, mask, entries, settings)

    def _guarded(self, ids: Tensor, mask: Tensor, entries: list[int], settings: dict[str, Any]) -> Tensor:
        """Answers of a batch in which some prompts are guarded."""
        if settings.get("return_dict_in_generate"):
            raise InvalidHyperparameter(
                "Guarded prompts give tokens only: leave out return_dict_in_generate."
            )
        if settings.get("past_key_values") is not None or settings.get("cache") is not None:
            raise ModelMismatch("A guard must see the whole prompt: leave out the cache.")
        ignored = [name for name in UNUSED if settings.get(name)]
        if ignored:
            warnings.warn(f"Guarded prompts are searched without {', '.join(ignored)}.", stacklevel=4)
        several = int(self._setting(settings, "num_return_sequences") or 1)
        search = self._search(settings, ids.shape[1], several)
        rows = [row for row, entry in enumerate(entries) if entry >= 0]
        others = [row for row, entry in enumerate(entries) if entry < 0]
        streamer = settings.get("streamer")
        found = self._searched(
            ids[rows], mask[rows], [self._entries[entries[row]] for row in rows], search, streamer
        )
        written: dict[int, list[Tokens]] = {}
        for row, hypotheses in zip(rows, found, strict=True):
            answers = [one.tokens for one in hypotheses]
            written[row] = [answers[min(number, len(answers) - 1)] for number in range(several)]
        if others:
            rest = {
                key: value for key, value in settings.items() if key not in ("input_ids", "attention_mask")
            }
            made = self.inner.generate(input_ids=ids[others], attention_mask=mask[others], **rest)  # pyright: ignore[reportCallIssue]
            answers = made[:, ids.shape[1] :].tolist()
            for number, row in enumerate(others):
                written[row] = [tuple(one) for one in answers[number * several : (number + 1) * several]]
        padding = self._setting(settings, "pad_token_id")
        return _together(ids, written, several, self.task.padding if padding is None else int(padding))

    def _searched(
        self, ids: Tensor, mask: Tensor, forbidden: list[Forbidden], search: Search, streamer: Any
    ) -> list[list[Hypothesis]]:
        """Restricted beam search, streamed if asked for."""
        longest = max(min(len(self.store.tokenize(phrase)) for phrase in one.phrases) for one in forbidden)
        if longest > search.max_new_tokens:
            warnings.warn(
                f"A forbidden phrase has {longest} tokens, an answer at most {search.max_new_tokens}: answers cannot "
                "hold it anyway.",
                stacklevel=5,
            )
        decode = self.task.encoder.batch_decode

        def judge(prompt: int, candidates: Sequence[Tokens]) -> list[float]:
            texts = decode([list(one) for one in candidates], skip_special_tokens=True)
            return self.matching.penalties(texts, forbidden[prompt], self.store.encoder)

        restriction = Restriction(
            [one.machine for one in forbidden],
            self.settings.prefix_penalty,
            judge,
            self.settings.soft == "penalise",
        )
        if streamer is None:
            return beam_search(self.inner, ids, mask, search, restriction)
        if len(ids) > 1:
            raise InvalidHyperparameter(f"A streamer takes one prompt at a time, not {len(ids)}.")
        streamer.put(ids.cpu())
        sent = 0

        def send(certain: Tokens) -> None:
            nonlocal sent
            for token in certain[sent:]:
                streamer.put(torch.tensor([token]))
            sent = max(sent, len(certain))

        found = beam_search(self.inner, ids, mask, search, restriction, send)
        send(found[0][0].tokens)
        streamer.end()
        return found

    def _search(self, settings: dict[str, Any], prompt: int, several: int) -> Search:
        """How long and how wide, from the settings of a call, the model's own, and the method's."""
        longest = self._setting(settings, "max_new_tokens")
        if longest is None:
            longest = (self._setting(settings, "max_length") or 20 + prompt) - prompt
        if longest < 1:
            raise InvalidHyperparameter(f"An answer needs at least 1 new token, not {longest}.")
        stops = self._setting(settings, "eos_token_id")
        stops = self.task.stops if stops is None else stops
        ends = frozenset(
            int(token)
            for token in (stops if isinstance(stops, Sequence) else torch.as_tensor(stops).flatten().tolist())
        )
        width = max(self.settings.beam_width, several)
        return Search(width, int(longest), ends, self.settings.length_penalty, several)

    def _setting(self, settings: dict[str, Any], name: str) -> Any:
        if settings.get(name) is not None:
            return settings[name]
        given = getattr(settings.get("generation_config"), name, None)
        return getattr(self.generation_config, name, None) if given is None else given

    def _mask(self, ids: Tensor, settings: dict[str, Any]) -> Tensor:
        """The mask that is given; else all tokens that are no padding, as transformers infers it."""
        if settings.get("attention_mask") is not None:
            return settings["attention_mask"]
        padding = self._setting(settings, "pad_token_id")
        if padding is None or padding in self.task.stops:
            return torch.ones_like(ids)
        return (ids != int(padding)).long()

    def _places(self, mask: Tensor) -> dict[str, Tensor]:
        import inspect

        inner: Any = self.plain
        takes = "position_ids" in inspect.signature(inner.forward).parameters
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes else {}


def _tokens(task: Language, wording: Wording) -> list[int]:
    return task.prompt(wording.text) if wording.templated else task.tokens(wording.text, first=True)


def _together(
    ids: Int[Tensor, "rows tokens"], written: Mapping[int, list[Tokens]], several: int, padding: int
) -> Int[Tensor, "answers tokens"]:
    """Prompts with their answers, padded on the right."""
    longest = max(len(one) for answers in written.values() for one in answers)
    result = torch.full((len(ids) * several, ids.shape[1] + longest), padding, device=ids.device)
    for row in range(len(ids)):
        for number, answer in enumerate(written[row]):
            result[row * several + number, : ids.shape[1]] = ids[row]
            result[row * several + number, ids.shape[1] : ids.shape[1] + len(answer)] = torch.tensor(
                answer
            ).to(ids)
    return result
