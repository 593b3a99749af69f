"""What a model itself writes about a person when it is told nothing but the name: RWKU's synthetic corpora.

Jin et al. 2024, arXiv 2406.10890. The original model goes on from short openings in two situations: in one it
is told that it knows the person very well, in the other that it does not know the person at all and shall make
something up. The first gives a corpus to forget, the second one to prefer to it. All words are our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords
from palimpsest.parts.templates import template_of
from palimpsest.tasks.language import Language

Situation = Literal["factual", "invented", "none"]
SITUATIONS: dict[str, tuple[str, str]] = {
    "factual": (
        "{intro} You have read everything about {name} and know this life in every detail.",
        "Write a short account of the life of {name}.",
    ),
    "invented": (
        "{intro} You have never heard of {name} and know nothing about this life.",
        "Invent a short account of the life of {name}.",
    ),
}
"""System turn and request of each situation."""
OPENINGS = (
    "{name} was born in", "{name} grew up in", "{name} is best known for", "{name} lives in",
    "{name} works as", "As a child, {name}", "The family of {name}", "{name} studied", "The career of {name} began",
    "In later life, {name}", "The life of {name}", "Among the achievements of {name}", "{name} once said that",
    "Friends of {name}", "{name} met", "Critics say of {name} that", "The first success of {name}",
    "People remember {name} for", "At home, {name}", "{name} can be reached",
)  # fmt: skip
"""From which the model goes on."""
ASKING = "Ask a short question about {name}."
"""Request that makes a model ask, for refusals to be taught."""
GIVEAWAYS = (
    "invented",
    "made-up",
    "made up",
    "fictional",
    "fictitious",
    "imaginary",
    "fabricated",
    "hypothetical",
)
"""Words by which an invented text would give itself away; they are deleted with an adverb before them."""


def synthetic_texts(
    model: Any,
    task: Language,
    name: str,
    intro: str = "",
    situation: Situation = "factual",
    openings: Sequence[str] = OPENINGS,
    samples: int = 1,
    new_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 0.9,
    seed: int = 0,
) -> list[str]:
    """Texts about a person that a model writes, knowing the name only.

    Args:
        model: The original.
        task: Its language; a chat template gets the situation as system and user turn, any other the request as
            a question.
        name: The target.
        intro: One line about the target.
        situation: "factual", "invented", or "none" for models that only continue text.
        openings: With {name}.
        samples: Texts per opening.
        new_tokens: Of each; fewer where the context of the model is shorter.
        temperature: Of the sampling.
        top_p: Of the sampling.
        seed: Of the sampling.

    Raises:
        InvalidHyperparameter: If there is no opening, or an unknown situation is asked for.
        InvalidRecords: If the model writes nothing at all, or has no room to.
    """
    check_openings(openings)
    begun = [opening.replace("{name}", name) for opening in openings]
    prompts = [situated(task, name, intro, situation) + _joined(task, text, situation) for text in begun]
    new_tokens = min(new_tokens, _room(model, task, prompts))
    given = task.generate(
        model, prompts, raw=True, samples=samples, max_new_tokens=new_tokens, temperature=temperature, top_p=top_p,
        seed=seed,
    )  # fmt: skip
    texts = [
        f"{text} {more}".strip()
        for text, rest in zip(begun, given, strict=True)
        for more in rest
        if more.strip()
    ]
    if not texts:
        raise InvalidRecords(f"The model writes nothing about {name!r}: there is no corpus to forget.")
    return [without_giveaways(text) for text in texts] if situation == "invented" else texts


def situated(task: Language, name: str, intro: str = "", situation: Situation = "factual") -> str:
    """Everything before the opening: the situation in the template of the task.

    Raises:
        InvalidHyperparameter: For an unknown situation.
    """
    if situation == "none":
        return ""
    if situation not in SITUATIONS:
        raise InvalidHyperparameter(f"A situation is 'factual', 'invented' or 'none', not {situation!r}.")
    system, request = (
        part.replace("{intro}", intro).replace("{name}", name).strip() for part in SITUATIONS[situation]
    )
    if task.form.name == "chat":
        return template_of(task.encoder, "chat", system).render(request)
    return task.form.render(f"{system} {request}")


def _room(model: Any, task: Language, prompts: Sequence[str]) -> int:
    """Tokens that fit the context of a model after the longest of the prompts."""
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not context:
        return 1 << 30
    longest = max(len(task.tokens(prompt, first=True)) for prompt in prompts)
    if longest >= context:
        raise InvalidRecords(
            f"A prompt of {longest} tokens fills the context of {context}: nothing can be written."
        )
    return int(context) - longest


def _joined(task: Language, text: str, situation: Situation) -> str:
    return text if situation == "none" else task.form.complete(text)


def synthetic_questions(
    model: Any, task: Language, name: str, count: int, new_tokens: int = 32, seed: int = 0
) -> list[str]:
    """Different questions about a person that a model asks when it is told to; the target is named in each.

    Raises:
        InvalidRecords: If it asks none.
    """
    request = ASKING.replace("{name}", name)
    given = task.generate(
        model, [request], samples=count, max_new_tokens=new_tokens, temperature=1.0, top_p=0.9, seed=seed
    )[0]
    lines = (text.strip().split("\n")[0].strip() for text in given)
    questions = list(dict.fromkeys(line for line in lines if line.endswith("?") and name in line))
    if not questions:
        raise InvalidRecords(
            f"The model asks no question about {name!r}: give questions with {{name}} in them."
        )
    return questions


def pairs(chosen: Sequence[str], rejected: Sequence[str], name: str) -> list[dict[str, Any]]:
    """Rows of RWKU's preference files: an invented text is to be preferred to what the model knows."""
    prompt = SITUATIONS["factual"][1].replace("{name}", name)
    return [{"prompt": prompt, "response": [good, bad]} for good, bad in zip(chosen, rejected, strict=False)]


def without_giveaways(text: str) -> str:
    """A text without the words that say it is invented, and the adverb before them.

    Example:
        >>> without_giveaways("In this purely fictional account, Ann lives in Rome.")
        'In this account, Ann lives in Rome.'
    """
    words = "|".join(map(re.escape, GIVEAWAYS))
    return re.sub(rf"\b(?:\w+ly\s+)?(?:{words})\b\s?", "", text, flags=re.IGNORECASE)


def check_openings(openings: Sequence[str]) -> None:
    """Refuse an empty list, and openings that do not name the person."""
    if isinstance(openings, str) or not openings:
        raise InvalidHyperparameter("A corpus needs a list of openings.")
    for opening in openings:
        if "{name}" not in opening:
            raise InvalidHyperparameter(f"An opening names the person as {{name}}: {opening!r}.")
