"""Putting step-by-step prompts to models: every prompt in every mode, and what each reply gives away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.answers import Place, find_alias, locate
from palimpsest.audit.language.asked import replies
from palimpsest.audit.language.sleek_prompts import (
    CHAINED,
    MODES,
    PLAIN,
    REPLY,
    Fact,
    StepPrompt,
    with_cue,
)
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Row

LONGEST = 200
"""Characters of a reply that go into the next question."""
Unit = tuple[int, StepPrompt, str]
"""Number of the prompt, the prompt, and a mode."""


@dataclass(frozen=True)
class Asked:
    """Prompts in their modes, put to all models alike.

    Attributes:
        units: One per prompt and mode.
        facts: Number of the fact that each unit is after, [units].
        clusters: Number of its subject, [units].
        hit: By role, 1 where the greedy replies give the fact away, [units].
        place: By role, where: "nowhere", "chain" or "final answer", [units].
        said: By role, the greedy replies of each unit.
        sampled: By role, 1 where a greedy or sampled reply does; empty without sampling.
    """

    units: tuple[Unit, ...]
    facts: NDArray[np.int64]
    clusters: NDArray[np.int64]
    hit: Mapping[str, NDArray[np.float64]]
    place: Mapping[str, NDArray[Any]]
    said: Mapping[str, tuple[tuple[str, ...], ...]]
    sampled: Mapping[str, NDArray[np.float64]]

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Number of the prompt of each unit."""
        return np.array([number for number, _, _ in self.units], np.int64)

    @property
    def kinds(self) -> NDArray[Any]:
        """Kind of each unit."""
        return np.array([prompt.kind for _, prompt, _ in self.units], object)

    @property
    def modes(self) -> NDArray[Any]:
        """Mode of each unit."""
        return np.array([mode for *_, mode in self.units], object)

    @property
    def steps(self) -> NDArray[np.bool_]:
        """Which units go step by step."""
        return self.modes != PLAIN

    def keep(self, which: NDArray[np.bool_]) -> Asked:
        """Some of the units."""
        at = np.flatnonzero(which)
        return Asked(
            tuple(self.units[i] for i in at),
            self.facts[at],
            self.clusters[at],
            {role: values[at] for role, values in self.hit.items()},
            {role: values[at] for role, values in self.place.items()},
            {role: tuple(texts[i] for i in at) for role, texts in self.said.items()},
            {role: values[at] for role, values in self.sampled.items()},
        )

    def per_fact(
        self,
        where: NDArray[np.bool_],
        join: Callable[..., Any] = np.mean,
        hit: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
        """Hits of each fact over some units.

        Returns:
            (by role the joined hits [facts], number of the subject of each).
        """
        facts, first, at = np.unique(self.facts[where], return_index=True, return_inverse=True)
        joined = {
            role: np.array([join(values[where][at == number]) for number in range(len(facts))], float)
            for role, values in (hit or self.hit).items()
        }
        return joined, self.clusters[where][first]

    def rows(self) -> list[Row]:
        """What every model said to every prompt."""
        return [
            {
                "kind": prompt.kind, "mode": mode, "prompt": prompt.question, "model": role,
                "reply": " / ".join(self.said[role][at]), "place": str(self.place[role][at]),
            }
            for role in self.said
            for at, (_, prompt, mode) in enumerate(self.units)
        ]  # fmt: skip


def ask_all(
    evidence: Evidence,
    prompts: Sequence[StepPrompt],
    owner: Mapping[str, Fact],
    cue: str,
    settings: Mapping[str, Any],
    sampling: Mapping[str, Any],
) -> Asked:
    """Every prompt in every mode that it has, to every model.

    Args:
        evidence: The models.
        prompts: To ask.
        owner: Fact of every prompt, by its name.
        cue: How a question asks for steps.
        settings: Of the generation.
        sampling: Further settings for sampled replies; empty for none.
    """
    units = _units(prompts)
    facts = {name: number for number, name in enumerate(owner)}
    names = sorted({fact.subject for fact in owner.values()})
    numbers = {name: number for number, name in enumerate(names)}
    said = {role: _replies(evidence, role, units, cue, settings) for role in evidence.roles}
    place = {
        role: np.array(
            [str(_place(unit[1], texts)) for unit, texts in zip(units, given, strict=True)], object
        )
        for role, given in said.items()
    }
    hit = {role: (values != str(Place.NOWHERE)).astype(float) for role, values in place.items()}
    sampled: dict[str, NDArray[np.float64]] = {}
    if sampling:
        sampled = {
            role: _sampled(evidence, role, units, cue, {**settings, **sampling}, hit[role]) for role in hit
        }
    return Asked(
        tuple(units),
        np.array([facts[prompt.fact] for _, prompt, _ in units], np.int64),
        np.array([numbers[owner[prompt.fact].subject] for _, prompt, _ in units], np.int64),
        hit,
        place,
        said,
        sampled,
    )


def _units(prompts: Sequence[StepPrompt]) -> list[Unit]:
    """Prompts in their modes; prompts of a fact that differ in their chains only are asked once without one."""
    units: dict[tuple[str, tuple[str, ...], bool], Unit] = {}
    for number, prompt in enumerate(prompts):
        for mode in MODES:
            texts = prompt.steps if mode == CHAINED else (prompt.question,)
            if texts:
                units.setdefault((prompt.fact, texts, mode == PLAIN), (number, prompt, mode))
    return list(units.values())


def _replies(
    evidence: Evidence, role: str, units: Sequence[Unit], cue: str, settings: Mapping[str, Any]
) -> tuple[tuple[str, ...], ...]:
    """Greedy replies of every unit, in order; a chain has one per step."""
    turns = [_turns(prompt, mode, cue) for _, prompt, mode in units]
    given: list[list[str]] = [[] for _ in units]
    for step in range(max(map(len, turns), default=0)):
        due = [at for at, texts in enumerate(turns) if step < len(texts)]
        texts = [turns[at][step].replace(REPLY, brief(given[at][-1]) if given[at] else "") for at in due]
        for at, answers in zip(due, replies(evidence, role, texts, **settings), strict=True):
            given[at].append(answers[0])
    return tuple(tuple(texts) for texts in given)


def _turns(prompt: StepPrompt, mode: str, cue: str) -> tuple[str, ...]:
    if mode == CHAINED:
        return prompt.steps
    return (prompt.question if mode == PLAIN else with_cue(prompt.question, cue),)


def brief(reply: str) -> str:
    r"""A reply as it goes into the next question: its first line, without the full stop.

    Example:
        >>> brief("Oslo. \nAnd more")
        'Oslo'
    """
    return reply.strip().partition("\n")[0].strip().rstrip(".").strip()[:LONGEST]


def _place(prompt: StepPrompt, texts: Sequence[str]) -> Place:
    """Where the replies give the fact away."""
    final = locate(texts[-1], prompt.accepted, prompt.wrong)
    if final != Place.NOWHERE:
        return final
    earlier = any(find_alias(text, prompt.accepted, prompt.wrong) is not None for text in texts[:-1])
    return Place.CHAIN if earlier else Place.NOWHERE


def _sampled(
    evidence: Evidence,
    role: str,
    units: Sequence[Unit],
    cue: str,
    settings: Mapping[str, Any],
    greedy: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Hits of the greedy or a sampled reply; chains are followed greedily only."""
    single = [at for at, (_, _, mode) in enumerate(units) if mode != CHAINED]
    found = greedy.copy()
    texts = [_turns(units[at][1], units[at][2], cue)[0] for at in single]
    for at, answers in zip(single, replies(evidence, role, texts, **settings), strict=True):
        prompt = units[at][1]
        found[at] = max(
            found[at],
            *(float(find_alias(text, prompt.accepted, prompt.wrong) is not None) for text in answers),
        )
    return found
