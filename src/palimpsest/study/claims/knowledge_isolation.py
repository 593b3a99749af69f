"""Measurements for the claims of knowledge isolation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.records import Records
from palimpsest.forget import forget
from palimpsest.forget.gradient import REPORT_ATTRIBUTE
from palimpsest.forget.language.knowledge_isolation import IsolationReport
from palimpsest.forget.scopes import ScopeLike
from palimpsest.forget.traced import TRACING_ATTRIBUTE, isolated
from palimpsest.parts.decoder import decoder_of
from palimpsest.parts.parameters import unwrapped
from palimpsest.study.claims.answering import answer_losses, exact, language, retained
from palimpsest.study.claims.measuring import Setting, measurement
from palimpsest.tasks.tracing import Tracing, trace

TRACED: dict[str, Any] = {"samples": 5, "window": 2, "facts": 12}
"""Corrupted runs, layers restored together, and facts: the paper has 10, 10 (of 16 or 32 layers) and more facts."""
LEARN: dict[str, Any] = {
    "lr": 2e-3, "epochs": 12, "batch_size": 16, "accumulate": 1, "schedule": "constant", "cap": 2.5, "chance": 0.15,
}  # fmt: skip
"""Where what is forgotten and retained counts: the forget loss is capped. Every run ends with the first epoch after which at most 15 % of the forget rows are predicted word for word."""
PUBLISHED: dict[str, Any] = {"cap": None, "ratio": 2.0}
"""Where layers and weights are compared: the loss without a cap, as it is published; two retained records per forget record."""
SHARE = 0.7
"""Of the rise of the perplexity under the loss on all layers, that is allowed."""


@dataclass
class Isolated:
    """What is measured on one setting, each run made once.

    Attributes:
        setting: The request.
        models: Unlearned models by the name of the run.
        traced: Tracing of the original.
    """

    setting: Setting
    models: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    traced: Tracing | None = None

    def tracing(self) -> Tracing:
        """Traces of the forgotten facts through the original."""
        if self.traced is None:
            at = self.setting
            self.traced = trace(at.original, at.split.forget, language(at), at.runtime, **TRACED)
        return self.traced

    def layers(self, which: str) -> tuple[int, ...]:
        """Layers of a run: found by tracing, the last as many, or all."""
        depth = len(decoder_of(self.setting.original).blocks)
        found = self.tracing().layers
        return {"last": tuple(range(depth - len(found), depth)), "all": tuple(range(depth))}.get(which, found)

    def run(self, which: str = "traced", **changes: Any) -> nn.Module:
        """Unlearn in the MLPs of some layers."""
        name = " ".join([which, *(f"{key}={value}" for key, value in changes.items())])
        if name not in self.models:
            at = self.setting
            scope: ScopeLike = {"name": "traced", **TRACED}
            if which != "traced":
                scope = {"name": "blocks", "layers": list(self.layers(which)), "kind": "mlp"}
            settings: dict[str, Any] = {**LEARN, "scope": scope, **changes}
            self.models[name] = forget(
                at.original, at.split, "knowledge-isolation", at.task, runtime=at.runtime, **settings
            )
        return self.models[name]

    def kept(self, model: nn.Module) -> float:
        """Share of retained questions that are answered with the very words."""
        return exact(self.setting, model, retained(self.setting))

    def retain_loss(self, model: nn.Module) -> float:
        """Mean loss of retained answers."""
        return float(answer_losses(self.setting, model, retained(self.setting)).mean())

    def perplexity(self, model: nn.Module) -> float:
        """Of texts that have nothing to do with people and were not trained on."""
        task, texts = language(self.setting), general_texts(self.setting)
        with torch.no_grad():
            losses = [
                task.loss_per_example(model, batch) for batch in self.setting.runtime.batches(texts, task, 32)
            ]
        return math.exp(float(torch.cat(losses).mean()))


_CACHE: list[Isolated] = []


def isolated_runs(setting: Setting) -> Isolated:
    """The runs of a setting, kept while its measurements are taken."""
    if not _CACHE or _CACHE[0].setting.original is not setting.original:
        _CACHE[:] = [Isolated(setting)]
    return _CACHE[0]


def general_texts(setting: Setting) -> Records:
    """Test texts about nobody.

    Raises:
        InvalidRecords: If there are none.
    """
    test = setting.split.test
    at = [] if test is None else [number for number, item in enumerate(test) if item.get("text") is not None]
    if test is None or not at:
        raise InvalidRecords("The claim needs running text among the test records.")
    return test.select(at)


# Claim 1: tracing


@measurement("knowledge-isolation.total-effect")
def total_effect(setting: Setting) -> float:
    """Mean probability of the answer's first token that noise on the subject takes away."""
    return isolated_runs(setting).tracing().total_effect


@measurement("knowledge-isolation.end-error")
def end_error(setting: Setting) -> float:
    """Largest difference from the clean run with the last state of the last layer restored."""
    traces = isolated_runs(setting).tracing().traces
    return max(abs(float(found.scores["state"][-1, -1]) - found.high) for found in traces)


@measurement("knowledge-isolation.before-error")
def before_error(setting: Setting) -> float:
    """Largest difference from the corrupted run with a state before the subject restored."""
    traces = isolated_runs(setting).tracing().traces
    return max(
        float((scores[: found.subject[0]] - found.low).abs().max())
        for found in traces
        for scores in found.scores.values()
    )


# Claim 2: where the facts are


@measurement("knowledge-isolation.early-over-late")
def early_over_late(setting: Setting) -> float:
    """Effect of MLPs at the last subject token: mean over the first half of the layers minus 1.5 x the second."""
    effect = isolated_runs(setting).tracing().effects("mlp")["last subject"]
    half = len(effect) // 2
    return float(effect[:half].mean() - 1.5 * effect[half:].mean())


@measurement("knowledge-isolation.mlp-over-attention")
def mlp_over_attention(setting: Setting) -> float:
    """Mean effect at the last subject token: of MLPs minus of attentions."""
    tracing = isolated_runs(setting).tracing()
    return float(
        tracing.effects("mlp")["last subject"].mean() - tracing.effects("attention")["last subject"].mean()
    )


@measurement("knowledge-isolation.peak")
def peak(setting: Setting) -> float:
    """Largest effect of MLPs at the last subject token, as a share of the total effect."""
    return isolated_runs(setting).tracing().peak


@measurement("knowledge-isolation.peak-at-the-last-token")
def peak_at_the_last_token(setting: Setting) -> float:
    """Largest effect of MLPs at the last token of the prompt, as a share of the total effect."""
    tracing = isolated_runs(setting).tracing()
    return float(tracing.effects("mlp")["last"].max()) / tracing.total_effect


# Claim 3: what moves


@measurement("knowledge-isolation.others-changed")
def others_changed(setting: Setting) -> float:
    """Tensors that changed and are not of the MLPs of the layers that were found; -1 if none of those changed."""
    after = isolated_runs(setting).run()
    found: Tracing = getattr(after, TRACING_ATTRIBUTE)
    chosen = set(isolated(setting.original, found.layers, "mlp"))
    before = unwrapped(setting.original).state_dict()
    moved = {
        name for name, value in unwrapped(after).state_dict().items() if not torch.equal(value, before[name])
    }
    return float(len(moved - chosen) if moved & chosen else -1)


# Claim 4: forgetting


@measurement("knowledge-isolation.forgotten-left")
def forgotten_left(setting: Setting) -> float:
    """Share of forgotten questions that are still answered with the very words."""
    return exact(setting, isolated_runs(setting).run(), setting.split.forget)


@measurement("knowledge-isolation.retained-share")
def retained_share(setting: Setting) -> float:
    """Exact retained answers, as a share of the original's."""
    runs = isolated_runs(setting)
    return runs.kept(runs.run()) / max(runs.kept(setting.original), 1e-9)


# Claim 5: against other layers


@measurement("knowledge-isolation.rise-over-share")
def rise_over_share(setting: Setting) -> float:
    """Rise of the perplexity of unrelated texts, minus 70 % of that of the same loss on the MLPs of all layers."""
    runs = isolated_runs(setting)
    before = runs.perplexity(setting.original)
    ours, theirs = (runs.perplexity(runs.run(which, **PUBLISHED)) - before for which in ("traced", "all"))
    return ours - SHARE * theirs


@measurement("knowledge-isolation.gain-on-last")
def gain_on_last(setting: Setting) -> float:
    """Exact retained answers minus those of the same loss on the last as many layers, at equal forgetting."""
    runs = isolated_runs(setting)
    return runs.kept(runs.run(**PUBLISHED)) - runs.kept(runs.run("last", **PUBLISHED))


@measurement("knowledge-isolation.last-forgot")
def last_forgot(setting: Setting) -> float:
    """Share of forget records that the run in the last layers still predicts: whether it forgot as much at all."""
    told: IsolationReport = getattr(isolated_runs(setting).run("last", **PUBLISHED), REPORT_ATTRIBUTE)
    return told.accuracy[-1]


# Claim 6: the weight that adapts


@measurement("knowledge-isolation.adaptive-over-fixed")
def adaptive_over_fixed(setting: Setting) -> float:
    """Loss of retained answers at the end, over that with m fixed at 1.2, after four epochs of each."""
    runs = isolated_runs(setting)
    return runs.retain_loss(_long(runs)) / runs.retain_loss(_long(runs, high=1.2))


@measurement("knowledge-isolation.weights-seen")
def weights_seen(setting: Setting) -> float:
    """Number of different values of m, all of them from 1.2 to the cap of 2.3; -1 if one lies outside."""
    told: IsolationReport = getattr(_long(isolated_runs(setting)), REPORT_ATTRIBUTE)
    inside = all(1.2 <= value <= 2.3 for value in told.multipliers)
    return float(len(set(told.multipliers)) if inside else -1)


def _long(runs: Isolated, **changes: Any) -> nn.Module:
    """Four epochs, whatever is forgotten by then."""
    return runs.run(**PUBLISHED, chance=None, epochs=4, **changes)
