"""Causal tracing: which hidden states carry a fact from its subject to the answer.

Meng et al. 2022, "Locating and Editing Factual Associations in GPT", arXiv 2202.05262, as knowledge isolation
uses it (Agrawal and Huang 2025, arXiv 2504.12996). The subject's embeddings are corrupted with noise, then one
state at a time is put back to what it was in the clean run; what brings the answer back, carried it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords
from palimpsest.core.modes import evaluating
from palimpsest.core.unlearner import check_range
from palimpsest.parts.decoder import Decoder, decoder_of, part_of
from palimpsest.parts.subject_span import Span

Kind = Literal["state", "mlp", "attention"]
Noise = Float[Tensor, "samples subject dim"]
ROWS = 256
"""At most about this many rows go through the model at once."""
GROUPS = ("before", "first subject", "middle subject", "last subject", "further", "last")


@dataclass(frozen=True)
class FactTrace:
    """What was found for one fact.

    Attributes:
        answer: Token that the clean model predicts.
        high: Its probability in the clean run.
        low: Its mean probability over the corrupted runs.
        subject: Tokens [begin, end) of the subject.
        scores: By kind, [tokens, layers]: mean probability of the answer with that state restored.
    """

    answer: int
    high: float
    low: float
    subject: Span
    scores: dict[str, Float[Tensor, "tokens layers"]] = field(default_factory=dict)

    def indirect_effect(self, kind: Kind) -> Float[Tensor, "tokens layers"]:
        """Probability that restoring a state brings back."""
        return self.scores[kind] - self.low

    @property
    def total_effect(self) -> float:
        """Probability that the corruption takes away."""
        return self.high - self.low


def trace_fact(
    model: nn.Module,
    tokens: Int[Tensor, " tokens"],
    subject: Span,
    noise: Noise,
    window: int = 10,
    kinds: Sequence[Kind] = ("state", "mlp", "attention"),
    answer: int | None = None,
) -> FactTrace | None:
    """Trace one fact through a decoder; the model stays as it is.

    The same noise is used for every token and layer, so that differences are paired.

    Args:
        model: Called with `input_ids`; gives logits, or something that holds them.
        tokens: A prompt whose next token is the answer, without padding.
        subject: Tokens [begin, end) to corrupt.
        noise: Added to the embeddings of the subject, one row per corrupted run.
        window: So many MLPs or attentions around a layer are restored together; "state" restores the
            output of one block alone.
        kinds: What to restore.
        answer: The token that a model which knows the fact predicts. If the model predicts another one,
            there is nothing to trace and the result is None.

    Raises:
        InvalidHyperparameter: If the span lies outside the prompt, the noise does not fit it or is not
            finite, or a kind is unknown.
        ModelMismatch: If the model's blocks are not found.
    """
    anatomy = decoder_of(model)
    _check(tokens, subject, noise, window, kinds)
    with torch.no_grad(), evaluating(model):
        clean = _next_probabilities(model, tokens[None])[0]
        predicted = int(clean.argmax())
        if answer is not None and predicted != answer:
            return None
        corrupted = _corrupted(model, anatomy, tokens, subject, noise, 1, None, predicted)
        found = FactTrace(predicted, float(clean[predicted]), float(corrupted[0]), subject)
        for kind in kinds:
            columns = [
                _corrupted(model, anatomy, tokens, subject, noise, len(tokens), names, predicted)
                for names in _restored(model, anatomy, kind, window)
            ]
            found.scores[kind] = torch.stack(columns, 1)
    return found


def restoration_window(layer: int, window: int, layers: int) -> range:
    """Layers that are restored together around one: window // 2 before it, the rest from it on.

    Example:
        >>> restoration_window(6, 10, 32)
        range(1, 11)
        >>> restoration_window(0, 3, 4)
        range(0, 2)
    """
    return range(max(0, layer - window // 2), min(layers, layer + (window + 1) // 2))


def _restored(model: nn.Module, anatomy: Decoder, kind: Kind, window: int) -> list[list[str]]:
    """Modules whose outputs are restored, for every layer."""
    if kind == "state":
        return [[block] for block in anatomy.blocks]
    parts = [part_of(model, block, kind) for block in anatomy.blocks]
    return [[parts[i] for i in restoration_window(at, window, len(parts))] for at in range(len(parts))]


def _corrupted(
    model: nn.Module,
    anatomy: Decoder,
    tokens: Int[Tensor, " tokens"],
    subject: Span,
    noise: Noise,
    positions: int,
    restored: list[str] | None,
    answer: int,
) -> Float[Tensor, " positions"]:
    """Mean probability of the answer over the corrupted runs, with modules restored at each of the positions."""
    found, at_once = [], max(1, ROWS // len(noise))
    for start in range(0, positions, at_once):
        part = range(start, min(start + at_once, positions))
        rows = 1 + len(part) * len(noise)
        with ExitStack() as hooks:
            hooks.enter_context(_noisy(model, anatomy.embedding, subject, noise.repeat(len(part), 1, 1)))
            for name in restored or ():
                hooks.enter_context(_restoring(model, name, part, len(noise)))
            probabilities = _next_probabilities(model, tokens.expand(rows, -1))[1:, answer]
        found.append(probabilities.view(len(part), len(noise)).mean(1).cpu())
    return torch.cat(found)


@contextmanager
def _noisy(model: nn.Module, embedding: str, subject: Span, noise: Noise) -> Generator[None]:
    """Add noise to the subject's embeddings in all rows but the first."""

    def add(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[1:, subject[0] : subject[1]] += noise.to(output)
        return changed

    handle = model.get_submodule(embedding).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _restoring(model: nn.Module, name: str, positions: range, samples: int) -> Generator[None]:
    """Put the first row's output back: at the first position in the first `samples` corrupted rows, and so on."""

    def put_back(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
        first = output[0] if isinstance(output, tuple) else output
        at = torch.tensor(positions, device=first.device).repeat_interleave(samples)
        rows = torch.arange(1, len(at) + 1, device=first.device)
        changed = first.clone()
        changed[rows, at] = first[0, at]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = model.get_submodule(name).register_forward_hook(put_back)
    try:
        yield
    finally:
        handle.remove()


def _next_probabilities(
    model: nn.Module, tokens: Int[Tensor, "rows tokens"]
) -> Float[Tensor, "rows vocabulary"]:
    output = model(input_ids=tokens)
    logits = output if isinstance(output, Tensor) else output.logits
    return logits[:, -1].float().softmax(-1)


# How much noise


def noise_scale(embeddings: Float[Tensor, "*tokens dim"], multiple: float = 3.0) -> float:
    """Standard deviation of the noise: a multiple of that of all subject-token embeddings of the facts."""
    check_range("multiple", multiple, 0, float("inf"), open_low=True)
    return multiple * float(embeddings.float().std())


def draw_noise(samples: int, width: int, dim: int, scale: float, generator: torch.Generator) -> Noise:
    """Noise for `samples` corrupted runs of a subject of `width` tokens."""
    check_range("samples", samples, 1, float("inf"))
    check_range("scale", scale, 0, float("inf"), open_low=True)
    return scale * torch.randn(samples, width, dim, generator=generator, device=generator.device)


# Over several facts


def token_groups(count: int, subject: Span) -> list[str]:
    """The group of every token of a prompt, one of `GROUPS`; a subject of one token is its "last subject"."""
    begin, end = subject

    def group(at: int) -> str:
        if at == end - 1:
            return "last subject"
        if at < begin:
            return "before"
        if at < end:
            return "first subject" if at == begin else "middle subject"
        return "last" if at == count - 1 else "further"

    return [group(at) for at in range(count)]


def average_effects(traces: Sequence[FactTrace], kind: Kind) -> dict[str, Float[Tensor, " layers"]]:
    """Mean indirect effect of every layer over facts, by group of tokens; groups without tokens are left out.

    Raises:
        InvalidRecords: If there are no traces: no fact was predicted right.
    """
    if not traces:
        raise InvalidRecords("No fact could be traced: the model predicts none of their answers.")
    rows: dict[str, list[Tensor]] = {}
    for trace in traces:
        effect = trace.indirect_effect(kind)
        groups = token_groups(len(effect), trace.subject)
        for name in set(groups):
            rows.setdefault(name, []).append(
                effect[[at for at, each in enumerate(groups) if each == name]].mean(0)
            )
    return {name: torch.stack(rows[name]).mean(0) for name in GROUPS if name in rows}


def concentrated_layers(effect: Float[Tensor, " layers"], count: int) -> range:
    """The `count` neighbouring layers with the largest summed effect; the lowest of equals."""
    check_range("count", count, 1, len(effect))
    sums = effect.double().unfold(0, count, 1).sum(1)
    start = int((sums >= sums.max() - 1e-12).nonzero()[0])
    return range(start, start + count)


def _check(tokens: Tensor, subject: Span, noise: Noise, window: int, kinds: Sequence[str]) -> None:
    begin, end = subject
    if tokens.dim() != 1 or not 0 <= begin < end <= len(tokens):
        raise InvalidHyperparameter(
            f"Subject tokens {begin} to {end} lie outside a prompt {tuple(tokens.shape)}."
        )
    if noise.dim() != 3 or len(noise) < 1 or noise.shape[1] != end - begin:
        raise InvalidHyperparameter(
            f"Noise must be [samples, {end - begin}, dim] with at least one sample, not {tuple(noise.shape)}."
        )
    if not bool(torch.isfinite(noise).all()):
        raise InvalidHyperparameter("The noise holds NaN or Inf.")
    check_range("window", window, 1, float("inf"))
    for kind in kinds:
        if kind not in ("state", "mlp", "attention"):
            raise InvalidHyperparameter(f"kinds are 'state', 'mlp' and 'attention', not {kind!r}.")
