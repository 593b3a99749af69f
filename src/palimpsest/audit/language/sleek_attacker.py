"""Who writes the step-by-step prompts: our templates, a chat model at hand, or one behind an endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from palimpsest.audit.language.sleek_prompts import KINDS, Fact, StepPrompt, prompts_of, request_for, written
from palimpsest.core.errors import InvalidAudit, InvalidRecords
from palimpsest.core.runtime import Runtime
from palimpsest.parts.chat_endpoint import ChatEndpoint

TEMPLATES = "templates"
Writer = Callable[[Sequence[str]], list[str]]
"""From requests to what a chat model writes for each."""


@dataclass(frozen=True)
class Written:
    """Prompts and what became of the rest.

    Attributes:
        prompts: Leak-checked.
        leaking: Prompts left out because they hold the answer.
        unusable: Facts without a single prompt.
    """

    prompts: tuple[StepPrompt, ...]
    leaking: int
    unusable: int


def by_templates(facts: Sequence[Fact], each: int) -> Written:
    """Prompts of our own making; a prompt that holds its answer is left out with the others of the fact's kind."""
    made: list[StepPrompt] = []
    leaking = unusable = 0
    for fact in facts:
        try:
            prompts = prompts_of(fact, each)
        except InvalidRecords:
            leaking += 1
            prompts = []
        unusable += not prompts
        made += prompts
    return Written(tuple(made), leaking, unusable)


def by_writer(facts: Sequence[Fact], each: int, writer: Writer) -> Written:
    """Prompts by a chat model: all kinds of every fact.

    Raises:
        InvalidAudit: If nothing usable came back.
    """
    asked = [(fact, kind) for fact in facts for kind in KINDS]
    replies = writer([request_for(fact, kind, each) for fact, kind in asked])
    made: list[StepPrompt] = []
    leaking = 0
    for (fact, kind), reply in zip(asked, replies, strict=True):
        prompts, dropped = written(fact, kind, reply, each)
        made += prompts
        leaking += dropped
    if not made:
        raise InvalidAudit(
            f"The attacker wrote no usable prompt for {len(facts)} facts ({leaking} held the answer): it is too weak, or "
            "its replies are empty."
        )
    used = {prompt.fact for prompt in made}
    return Written(tuple(made), leaking, sum(fact.fact not in used for fact in facts))


def writer_of(attacker: str, endpoint: ChatEndpoint | None, runtime: Runtime, keep: Path | None) -> Writer:
    """A chat model by name or folder, or an endpoint."""
    if endpoint is not None:
        return lambda requests: endpoint.complete_all(requests, keep)

    def ask(requests: Sequence[str]) -> list[str]:
        from palimpsest.models.causal import load_causal_lm
        from palimpsest.tasks.language import Language

        model = runtime.place(load_causal_lm(attacker))
        return [
            texts[0]
            for texts in Language(tokenizer=attacker).generate(
                model, requests, max_new_tokens=256, batch_size=8
            )
        ]

    return ask
