"""The scope that is found by looking: the blocks in which causal tracing sees the forgotten facts."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import check_range
from palimpsest.forget.scopes import Opened, only, scope
from palimpsest.parts.decoder import parts_of
from palimpsest.parts.parameters import matching
from palimpsest.tasks.language import Language
from palimpsest.tasks.tracing import trace

TRACING_ATTRIBUTE = "palimpsest_tracing"
"""Of a model that was unlearned in this scope: the `Tracing` that it was found by."""
KINDS = ("mlp", "self_attn", "all")
log = logging.getLogger("palimpsest")


@scope("traced")
@dataclass(frozen=True)
class Traced:
    """MLPs (or attentions, or both) of the layers whose MLPs carry the forgotten facts.

    Stage 1 of knowledge isolation (arXiv 2504.12996), for any objective. The layers are chosen by the effect
    of restored MLPs at the last subject token; norms, embeddings and head are frozen, as they are in the
    released code. To name layers instead of finding them: {"name": "blocks", "layers": [0, 1], "kind": "mlp"}.

    Attributes:
        kind: What moves in the layers: "mlp", "self_attn" or "all" (both, without norms).
        count: Number of neighbouring layers; a third of the stack by default. The paper takes 6 of 16 and of 32.
        facts: Forgotten facts that are traced, drawn at random; None traces all.
        samples: Corrupted runs per fact.
        multiple: Standard deviation of the noise as a multiple of that of the subjects' embeddings.
        window: MLPs that are restored together; of a small model choose 2 or 3.
    """

    kind: str = "mlp"
    count: int | None = None
    facts: int | None = 100
    samples: int = 10
    multiple: float = 3.0
    window: int = 10

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidHyperparameter(f"kind is one of {', '.join(KINDS)}, not {self.kind!r}.")
        for name in ("count", "facts", "samples", "window"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1, float("inf"))
        check_range("multiple", self.multiple, 0, float("inf"), open_low=True)

    def open(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> Opened:
        """The model with these parts free; its tracing is found under `TRACING_ATTRIBUTE` at the end."""
        found = trace(
            model, split.forget, task, runtime, samples=self.samples, multiple=self.multiple,
            window=self.window, kinds=("mlp",), facts=self.facts, count=self.count,
        )  # fmt: skip
        log.info("Traced %d facts (%d skipped): layers %s.", len(found.ids), len(found.skipped), found.layers)
        opened = only(model, isolated(model, found.layers, self.kind))

        def close() -> nn.Module:
            unlearned = opened.close()
            setattr(unlearned, TRACING_ATTRIBUTE, found)
            return unlearned

        return Opened(opened.model, opened.parameters, close)


def isolated(model: nn.Module, layers: tuple[int, ...], kind: str) -> list[str]:
    """Names of the parameters of MLPs, attentions or both of some layers."""
    parts = ("mlp", "self_attn") if kind == "all" else (kind,)
    return list(matching(model, *(name for part in parts for name in parts_of(model, layers, part))))
