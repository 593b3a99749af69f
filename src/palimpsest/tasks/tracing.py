"""Causal tracing over a set of facts: which layers of a language model carry them from subject to answer.

Meng et al. 2022, "Locating and Editing Factual Associations in GPT", arXiv 2202.05262, as stage 1 of knowledge
isolation uses it (Agrawal and Huang 2025, arXiv 2504.12996). One fact is traced by
`palimpsest.parts.causal_tracing.trace_fact`; here are the facts of records, and what they show together.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, UnknownName, shorten
from palimpsest.core.records import Records
from palimpsest.core.rendering import CHARTS
from palimpsest.core.runtime import Runtime
from palimpsest.core.unlearner import check_range
from palimpsest.core.writing import write_bytes
from palimpsest.parts.causal_tracing import (
    GROUPS,
    FactTrace,
    Kind,
    average_effects,
    concentrated_layers,
    draw_noise,
    noise_scale,
    trace_fact,
)
from palimpsest.parts.decoder import decoder_of, part_of
from palimpsest.parts.subject_span import Span, token_range
from palimpsest.tasks.language import Language, plain_questions

KINDS: tuple[Kind, ...] = ("state", "mlp", "attention")
log = logging.getLogger("palimpsest")
CLEAR = 0.05
"""Share of the total effect that a choice of layers should rest on."""
PICTURES = ("html", "json", "png", "svg")


@dataclass(frozen=True)
class Fact:
    """A prompt whose next token is the first of the answer.

    Attributes:
        id: Of the record.
        tokens: Of the prompt, in its template.
        subject: Tokens [begin, end) that cover the subject.
        answer: First token of the answer.
    """

    id: str
    tokens: Int[Tensor, " tokens"]
    subject: Span
    answer: int


@dataclass(frozen=True)
class Tracing:
    """What the traces of many facts show together.

    Attributes:
        ids: Records of the facts that were traced.
        traces: What was found for each of them.
        skipped: Records whose answer the clean model does not begin with: there is nothing to trace.
        layers: Neighbouring layers that together bring most of the answer back, found by `by` at `group`.
        depth: Layers of the model.
        by: What was restored for `layers`.
        group: Tokens at which it was.
        samples: Corrupted runs per fact.
        noise: Standard deviation of the noise.
        window: MLPs or attentions that are restored together.
    """

    ids: tuple[str, ...]
    traces: tuple[FactTrace, ...]
    skipped: tuple[str, ...]
    layers: tuple[int, ...]
    depth: int
    by: Kind
    group: str
    samples: int
    noise: float
    window: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """What was restored: "state", "mlp", "attention"."""
        return tuple(self.traces[0].scores)

    @property
    def high(self) -> float:
        """Mean probability of the answer's first token in the clean run."""
        return sum(trace.high for trace in self.traces) / len(self.traces)

    @property
    def low(self) -> float:
        """The same with a corrupted subject."""
        return sum(trace.low for trace in self.traces) / len(self.traces)

    @property
    def total_effect(self) -> float:
        """Mean probability that the corruption takes away."""
        return self.high - self.low

    @property
    def peak(self) -> float:
        """The largest effect that chose the layers, as a share of the total effect: near 0 it says nothing of them."""
        effect = float(self.effects(self.by)[self.group].max())
        return effect / self.total_effect if self.total_effect > 0 else 0.0

    def effects(self, kind: Kind) -> dict[str, Float[Tensor, " layers"]]:
        """Mean indirect effect of every layer, by group of tokens (see `causal_tracing.GROUPS`)."""
        return average_effects(self.traces, kind)

    def rows(self) -> list[dict[str, Any]]:
        """The maps as a table: kind, group, layer, effect, and whether the layer was chosen by this cell."""
        chosen = {(self.by, self.group, layer) for layer in self.layers}
        return [
            {"kind": kind, "group": group, "layer": layer, "effect": effect, "chosen": (kind, group, layer) in chosen}
            for kind in KINDS
            if kind in self.kinds
            for group, effects in self.effects(kind).items()
            for layer, effect in enumerate(effects.tolist())
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the averaged maps and how they were made, without the single facts."""
        return {
            "layers": list(self.layers),
            "depth": self.depth,
            "by": self.by,
            "group": self.group,
            "traced": len(self.ids),
            "skipped": list(self.skipped),
            "high": self.high,
            "low": self.low,
            "total_effect": self.total_effect,
            "samples": self.samples,
            "noise": self.noise,
            "window": self.window,
            "peak": self.peak,
            "effects": self.rows(),
        }

    def chart(self) -> Any:
        """Heat maps of the effects, as an Altair chart: see `palimpsest.report.tracing.tracing_chart`."""
        return CHARTS.get("tracing")(self)

    def save(self, path: str | Path) -> Path:
        """Write the heat maps: .html (opens offline), .png, .svg or .json (Vega-Lite).

        Raises:
            UnknownName: For another suffix.
            CannotWrite: If the place cannot be written; an older file stays as it was.
        """
        suffix = Path(path).suffix.lstrip(".").lower()
        if suffix not in PICTURES:
            raise UnknownName("format of a picture", suffix, PICTURES)
        out: Any = io.BytesIO() if suffix == "png" else io.StringIO()
        own = {"html": {"inline": True}, "png": {"scale_factor": 2}}.get(suffix, {})
        self.chart().save(out, format=suffix, **own)
        content = out.getvalue()
        return write_bytes(path, content if isinstance(content, bytes) else content.encode())


def trace(
    model: nn.Module,
    records: Records,
    task: Language,
    runtime: Runtime,
    *,
    samples: int = 10,
    multiple: float = 3.0,
    window: int = 10,
    kinds: Sequence[Kind] = KINDS,
    facts: int | None = None,
    count: int | None = None,
    by: Kind = "mlp",
    group: str = "last subject",
) -> Tracing:
    """Trace the facts that records ask for plainly; the model stays as it is, on its device.

    A fact costs tokens x layers x kinds x samples rows through the model. Facts whose answers all begin with
    the same token have no effect (that token does not depend on the subject) and dilute the maps.

    Args:
        model: A decoder that knows the facts.
        records: With a question that names its `subject`, and an answer.
        task: Language, with the tokenizer and the template that the model was trained under.
        runtime: Seed of noise and choice.
        samples: Corrupted runs per fact; they have the same noise for every fact, token and layer.
        multiple: Of the standard deviation of all subject-token embeddings: that of the noise.
        window: So many MLPs or attentions around a layer are restored together.
        kinds: What is restored: "state", "mlp", "attention".
        facts: At most so many, drawn at random; all by default.
        count: Number of neighbouring layers to choose; a third of the stack by default.
        by: The kind whose effect chooses them.
        group: The group of tokens whose effect chooses them.

    Raises:
        InvalidHyperparameter: If a setting is out of range.
        InvalidRecords: If a record has no subject, the subject does not occur in its question (with the
            prompt), or the model predicts none of the answers.
        ModelMismatch: If the model's blocks, or the parts of a block, are not found.
    """
    anatomy = decoder_of(model)
    depth = len(anatomy.blocks)
    count = max(1, depth // 3) if count is None else count
    _check(samples, multiple, window, kinds, facts, count, depth, by, group)
    for block, kind in product(anatomy.blocks, kinds):
        _ = kind == "state" or part_of(model, block, kind)
    asked = _asked(records, facts, runtime)
    found = [fact_of(asked[at], task) for at in range(len(asked))]
    embedding = model.get_submodule(anatomy.embedding)
    device = next(embedding.parameters()).device
    with torch.no_grad():
        subjects = [fact.tokens[fact.subject[0] : fact.subject[1]] for fact in found]
        embedded = embedding(torch.cat(subjects).to(device))
    scale = noise_scale(embedded, multiple)
    traced: dict[str, FactTrace] = {}
    for fact in runtime.track(found, "tracing", len(found)):
        width = fact.subject[1] - fact.subject[0]
        noise = draw_noise(samples, width, embedded.shape[-1], scale, runtime.generator("tracing noise"))
        one = trace_fact(model, fact.tokens.to(device), fact.subject, noise, window, kinds, fact.answer)
        if one is not None:
            traced[fact.id] = one
    skipped = [fact.id for fact in found if fact.id not in traced]
    if not traced:
        raise InvalidRecords(
            f"The model begins none of the {len(found)} answers right ({shorten(skipped, 3)}), so there is no "
            "knowledge to trace. Does it know the facts, and is the template that of its training?"
        )
    effect = average_effects(list(traced.values()), by)[group]
    layers = tuple(concentrated_layers(effect, count))
    whole = Tracing(
        tuple(traced), tuple(traced.values()), tuple(skipped), layers, depth, by, group, samples, scale, window
    )  # fmt: skip
    if whole.peak < CLEAR:
        log.warning(
            "Restoring %s at the %s token brings back at most %.1f %% of what the noise takes away: the layers %s that "
            "tracing chose are hardly better than others. Look at the maps (Tracing.save), or name layers by hand.",
            by, group, 100 * whole.peak, layers,
        )  # fmt: skip
    return whole


def fact_of(item: dict[str, Any], task: Language) -> Fact:
    """The fact of a record, as tokens.

    Raises:
        InvalidRecords: If it has no subject, or the subject does not occur in the question (with the prompt).
    """
    subject, question = item.get("subject"), str(item["question"])
    if not isinstance(subject, str) or not subject:
        raise InvalidRecords(
            f"Record {item['id']!r} names no `subject`, whose tokens tracing corrupts: add the field, or choose layers "
            "by hand ({'name': 'blocks', 'layers': [0, 1], 'kind': 'mlp'} as scope)."
        )
    at = question.find(subject)
    prompt = task.form.render(question)
    if at < 0:
        raise InvalidRecords(
            f"The subject {subject!r} of record {item['id']!r} does not occur in its prompt {prompt!r}."
        )
    start = task.form.prompt.index("{question}") + at
    ids, length = task.encode(question, str(item["answer"]))
    if len(ids) <= length:
        raise InvalidRecords(f"The answer of record {item['id']!r} tokenizes to nothing: {item['answer']!r}.")
    ends = token_ends(task.encoder, prompt)
    begin, end = token_range(ends, start, start + len(subject))
    special = length - len(ends)  # a beginning token stands before the text
    return Fact(str(item["id"]), torch.tensor(ids[:length]), (begin + special, end + special), ids[length])


def token_ends(encoder: Any, text: str) -> list[int]:
    """The character at which every token of a text ends; without offsets, what the tokens so far say."""
    if getattr(encoder, "is_fast", False):
        offsets = encoder(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [end for _, end in offsets]
    ids = encoder(text, add_special_tokens=False)["input_ids"]
    return [len(encoder.decode(ids[: at + 1])) for at in range(len(ids))]


def _asked(records: Records, facts: int | None, runtime: Runtime) -> Records:
    """The plain questions, or some of them drawn at random, in their order."""
    at = plain_questions(records)
    if facts is not None and facts < len(at):
        at = at[sorted(runtime.numpy("traced facts").choice(len(at), facts, replace=False))]
    return records.select(at)


def _check(
    samples: int,
    multiple: float,
    window: int,
    kinds: Sequence[str],
    facts: int | None,
    count: int,
    depth: int,
    by: str,
    group: str,
) -> None:
    check_range("samples", samples, 1, float("inf"))
    check_range("multiple", multiple, 0, float("inf"), open_low=True)
    check_range("window", window, 1, float("inf"))
    check_range("count", count, 1, depth)
    if facts is not None:
        check_range("facts", facts, 1, float("inf"))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or by not in kinds:
        raise InvalidHyperparameter(
            f"kinds are some of {', '.join(KINDS)}, `by` among them, not {list(kinds)} and {by!r}."
        )
    if group not in GROUPS:
        raise InvalidHyperparameter(f"group is one of {', '.join(GROUPS)}, not {group!r}.")
