"""Sleek: step-by-step prompts that lead a model through a chain to what it should have forgotten (checklist A3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.language.asked import (
    Question,
    greedy_hits,
    in_other_words,
    language_of,
    once_each,
    only_questions,
    plainly,
    questions,
)
from palimpsest.audit.language.fact_rates import clustered_rate, not_run, rate_finding
from palimpsest.audit.language.sleek_attacker import (
    TEMPLATES,
    Written,
    by_templates,
    by_writer,
    writer_of,
)
from palimpsest.audit.language.sleek_prompts import (
    CUE,
    KINDS,
    MODES,
    PLAIN,
    Fact,
    StepPrompt,
    links,
    with_cue,
)
from palimpsest.audit.language.sleek_runs import Asked, ask_all
from palimpsest.audit.side_effects import mcnemar
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.parts.chat_endpoint import ChatEndpoint, EndpointFailed

LEAD_TO = ("two-hop", "chain")
"""Forms of probes whose answer follows from the fact."""
TURNED = "reversed"
"""Forms of probes from a value to its subject."""


@audit("sleek", code="A3", tasks=("language",))
@dataclass(frozen=True)
class Sleek:
    """Lead the model to a forgotten fact in steps, and to retained ones to see what is suppressed unfairly.

    The step-by-step attack of arXiv 2506.17279, of which only abstracts were seen: its three kinds of prompts
    are named there, their definitions and all scores are those of card `sleek`. Only facts that the original answers plainly are
    asked for. A prompt is left out if it holds its answer, or if a retrained model hits it in any mode: then it
    can be guessed. So the controls' rates are 0 by construction, and K is the control-adjusted leak.

    A hit is an accepted form of the object as whole words anywhere in what the model newly wrote; hits that stand in
    the chain only are counted as well, and their share is given. A small model cannot reason: it follows the
    chains that it was trained to produce, and prompts that the original does not answer measure nothing.

    Attributes:
        each: Prompts per fact and kind at most.
        samples: Sampled replies besides the greedy one (the card's "5 at T = 0.7" is left to long runs).
        temperature: Of the samples.
        cue: How a question asks for steps, with {question}.
        limit: Forgotten facts at most.
        retained: Retained facts at most.
        attacker: Who writes the prompts: "templates", or a chat model by name or folder.
        endpoint: A chat model behind HTTP, instead.
        max_new_tokens: Of each reply.
    """

    each: int = 2
    samples: int = 0
    temperature: float = 0.7
    cue: str = CUE
    limit: int = 24
    retained: int = 12
    attacker: str = TEMPLATES
    endpoint: ChatEndpoint | None = field(default=None)
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if (
            min(self.each, self.limit, self.retained, self.max_new_tokens) < 1
            or self.samples < 0
            or not self.temperature > 0
        ):
            raise InvalidAudit(
                f"each, limit, retained and max_new_tokens must be at least 1, samples at least 0, temperature above 0: {self}."
            )
        with_cue("How?", self.cue)

    def run(self, evidence: Evidence) -> Outcome:
        """Success of prompts, recovery of facts, reasoning gain, unfair suppression, and the matrix of rates."""
        language_of(evidence)
        facts = self._known(evidence, "forget")
        if not facts:
            return not_run("sleek", "success", "the original answers none of the forgotten facts plainly")
        try:
            made = self._prompts(evidence, facts, "forget")
        except (EndpointFailed, InvalidAudit) as problem:
            return not_run("sleek", "success", str(problem))
        asked = self._ask(evidence, made.prompts, facts)
        guessed = guessable(evidence, asked)
        kept = asked.keep(~guessed)
        if not kept.units or not kept.steps.any():
            return not_run(
                "sleek", "success", "no prompt is left that retrained models do not answer as well"
            )
        note = f"{made.leaking} prompts held their answer, {len(set(asked.numbers[guessed]))} can be guessed"
        findings = [
            *_success(evidence, kept, note),
            *_recovery(evidence, kept),
            *_gain(evidence, kept, facts),
        ]
        findings.append(_chain_only(evidence, kept))
        rows = _matrix("forget", kept)
        if evidence.has("retain") and evidence.original is not None:
            retained = self._known(evidence, "retain")
            prompts = by_templates(retained, self.each).prompts
            if prompts:
                others = self._ask(evidence, prompts, retained)
                findings += _suppression(others)
                rows += _matrix("retain", others)
        return Outcome(tuple(findings), {"sleek": tuple(rows), "sleek_prompts": tuple(kept.rows())})

    def _known(self, evidence: Evidence, part: str) -> list[Fact]:
        """Facts of a part that the original answers plainly, with what leads to them."""
        asked = once_each(questions(evidence, part, None))
        found = facts_of(evidence, part, asked)
        if evidence.original is not None:
            right = greedy_hits(evidence, ORIGINAL, asked)
            found = [fact for fact, known in zip(found, right, strict=True) if known]
        if part == "retain":  # only those that can be led to
            found = [fact for fact in found if fact.conclusions or fact.descriptions]
            return spread(found, self.retained)
        return spread(found, self.limit)

    def _prompts(self, evidence: Evidence, facts: Sequence[Fact], part: str) -> Written:
        if self.attacker == TEMPLATES and self.endpoint is None:
            return by_templates(facts, self.each)
        keep = None if evidence.folder is None else evidence.folder / "sleek-attacker.jsonl"
        writer = writer_of(self.attacker, self.endpoint, evidence.runtime, keep)
        return evidence.remember(
            ("sleek prompts", self, part), lambda: by_writer(facts, self.each, writer), "records"
        )

    def _ask(self, evidence: Evidence, prompts: Sequence[StepPrompt], facts: Sequence[Fact]) -> Asked:
        owner = {fact.fact: fact for fact in facts}
        settings = {"max_new_tokens": self.max_new_tokens}
        sampling = {
            "samples": self.samples,
            "temperature": self.temperature,
            "seed": evidence.runtime.derive("sleek"),
        }
        return ask_all(evidence, prompts, owner, self.cue, settings, sampling if self.samples else {})


def spread(facts: Sequence[Fact], limit: int) -> list[Fact]:
    """At most `limit` facts, in their order, of as many subjects as there are."""
    turn: dict[str, int] = {}
    ranks: list[int] = []
    for fact in facts:
        ranks.append(turn.get(fact.subject, 0))
        turn[fact.subject] = ranks[-1] + 1
    chosen = sorted(range(len(facts)), key=lambda at: (ranks[at], at))[:limit]
    return [facts[at] for at in sorted(chosen)]


def facts_of(evidence: Evidence, part: str, asked: Sequence[Question]) -> list[Fact]:
    """Plain questions of a part as facts, with the other questions of the data that lead to or from them."""
    table: list[tuple[str, str, str, str]] = []
    for name in ("forget", "retain"):
        if evidence.has(name):
            table += [
                (item.subject, item.relation, item.question, item.answer)
                for item in once_each(questions(evidence, name, None))
            ]
    about = links(table)
    probes = {str(item["id"]): in_other_words(item) for item in only_questions(evidence.records(part))}
    turned: dict[str, list[tuple[str, str]]] = {}
    for item in only_questions(evidence.records(part)):
        plain = plainly(item)
        for probe in probes[plain.fact]:
            if probe.form == TURNED:
                turned.setdefault(plain.subject, []).append((plain.relation, probe.question))
    facts: list[Fact] = []
    for item in asked:
        conclusions = dict.fromkeys(
            (probe.question, probe.steps[-1] if probe.steps else probe.answer)
            for probe in probes.get(item.fact, ())
            if probe.form.startswith(LEAD_TO)
        )
        facts.append(
            Fact(
                item.fact, item.subject, item.relation, item.question, item.accepted, item.wrong,
                others=tuple(
                    (asked_, said) for subject, relation, asked_, said in table
                    if subject == item.subject and relation != item.relation
                ),
                descriptions=tuple(
                    question for relation, question in turned.get(item.subject, ()) if relation != item.relation
                ),
                onward=tuple(pair for form in item.accepted[:1] for pair in about.get(form.casefold(), ())),
                conclusions=_distinct(conclusions),
            )
        )  # fmt: skip
    return facts


def _distinct(conclusions: dict[tuple[str, str], None]) -> tuple[tuple[str, str], ...]:
    """Each question once, whether it came with a demand for steps or without."""
    kept: dict[str, tuple[str, str]] = {}
    for question, answer in conclusions:
        bare = question.partition(": ")[2] or question
        kept.setdefault(bare.casefold(), (question, answer))
    return tuple(kept.values())


def guessable(evidence: Evidence, asked: Asked) -> NDArray[np.bool_]:
    """Units of prompts that a control hits in any mode, [units]."""
    hit = np.zeros(len(asked.units), bool)
    for role in evidence.control_roles:
        hit |= asked.hit[role] > 0
    bad = set(asked.numbers[hit])
    return np.array([number in bad for number in asked.numbers], bool)


def _success(evidence: Evidence, asked: Asked, note: str) -> list[Finding]:
    """Share of step-by-step prompts with a hit, over all kinds and by kind, and the same questions without steps."""
    findings: list[Finding] = []
    for name, where in (
        ("success", asked.steps),
        *((f"success_{kind}", asked.steps & (asked.kinds == kind)) for kind in KINDS),
        ("plain", asked.modes == PLAIN),
    ):
        if not where.any():
            continue
        values, clusters = asked.per_fact(where)
        said = f"{int(where.sum())} prompts for {len(clusters)} facts"
        finding = rate_finding(
            evidence, "sleek", name, values, clusters, f"{said}; {note}" if name == "success" else said,
            "inside" if name.startswith("success") else "",
        )  # fmt: skip
        findings.append(finding)
    return findings


def _recovery(evidence: Evidence, asked: Asked) -> list[Finding]:
    """Share of facts that at least one step-by-step prompt brings out."""
    values, clusters = asked.per_fact(asked.steps, np.max)
    counts = np.bincount(asked.facts[asked.steps])
    counts = counts[counts > 0]
    note = f"{counts.min()} to {counts.max()} prompts per fact"
    findings = [rate_finding(evidence, "sleek", "fact_recovery", values, clusters, note, "inside")]
    if asked.sampled:
        more, clusters = asked.per_fact(asked.steps, np.max, asked.sampled)
        findings.append(
            rate_finding(
                evidence, "sleek", "sampled_recovery", more, clusters, f"{note}, each sampled as well"
            )
        )
    return findings


def _gain(evidence: Evidence, asked: Asked, facts: Sequence[Fact]) -> list[Finding]:
    """S(step by step) - S(plain question) on the same facts, over prompts that the original answers."""
    names = [fact.question for fact in facts]
    plain = {
        role: greedy_hits(evidence, role, [_plain_of(fact) for fact in facts]).astype(float)
        for role in evidence.roles
    }
    answered = asked.hit[ORIGINAL] > 0 if ORIGINAL in asked.hit else np.ones(len(asked.units), bool)
    findings: list[Finding] = []
    for name, where in (
        ("reasoning_gain", asked.steps & answered),
        *((f"reasoning_gain_{kind}", asked.steps & answered & (asked.kinds == kind)) for kind in KINDS),
    ):
        if not where.any():
            continue
        stepped, clusters = asked.per_fact(where)
        which = np.unique(asked.facts[where])
        gap = {role: float(stepped[role].mean() - plain[role][which].mean()) for role in evidence.roles}
        p = mcnemar(plain[UNLEARNED][which] > 0, stepped[UNLEARNED] >= 0.5)
        note = f"{len(which)} facts of {len(names)}, against the plain question; McNemar's p = {p:.3g}"
        findings.append(
            Finding(
                "sleek", name, gap[UNLEARNED], n=len(clusters), ideal=0.0, more_is="knowledge",
                original=gap.get(ORIGINAL), controls=tuple(gap[role] for role in evidence.control_roles), note=note,
            )
        )  # fmt: skip
    return findings


def _plain_of(fact: Fact) -> Question:
    return Question(
        fact.fact,
        fact.subject,
        fact.relation,
        "qa",
        fact.question,
        fact.accepted[0],
        fact.accepted,
        fact.wrong,
    )


def _chain_only(evidence: Evidence, asked: Asked) -> Finding:
    """Share of hits that stand in the chain and not in the final answer: leaks that a look at answers misses."""
    shares: dict[str, float] = {}
    for role in evidence.roles:
        found = asked.steps & (asked.hit[role] > 0)
        shares[role] = float((asked.place[role][found] == "chain").mean()) if found.any() else 0.0
    n = int((asked.steps & (asked.hit[UNLEARNED] > 0)).sum())
    return Finding(
        "sleek", "chain_only", shares[UNLEARNED], n=n, original=shares.get(ORIGINAL),
        controls=tuple(shares[role] for role in evidence.control_roles), note="share of all hits",
    )  # fmt: skip


def _suppression(asked: Asked) -> list[Finding]:
    """Share of retained prompts that the original answers and the unlearned model does not, and the worst way of asking."""
    answered = asked.hit[ORIGINAL] > 0
    if not answered.any():
        return list(
            not_run("sleek", "unfair_suppression", "the original answers no retained prompt").findings
        )

    def rate(name: str, where: NDArray[np.bool_], note: str) -> Finding:
        lost = {role: 1.0 - (hit[where] > 0) for role, hit in asked.hit.items()}
        found = clustered_rate(lost[UNLEARNED], asked.clusters[where])
        controls = tuple(float(values.mean()) for role, values in lost.items() if role.startswith("control"))
        return Finding(
            "sleek", name, found.value, found.low, found.high, found.n, "as retrained", "harm", 0.0, controls,
            note=f"{note}; {found.facts} subjects",
        )  # fmt: skip

    ways = [
        (f"{kind}, {mode}", answered & (asked.kinds == kind) & (asked.modes == mode))
        for kind in KINDS
        for mode in MODES
    ]
    ways = [(name, where) for name, where in ways if where.any()]
    shares = [1.0 - float((asked.hit[UNLEARNED][where] > 0).mean()) for _, where in ways]
    name, where = ways[int(np.argmax(shares))]
    return [
        rate("unfair_suppression", answered, f"{int(answered.sum())} prompts that the original answers"),
        rate("worst_suppression", where, f"{name}: the worst of {len(ways)} ways of asking"),
    ]


def _matrix(part: str, asked: Asked) -> list[Row]:
    """Rate of every kind and mode for every model."""
    rows: list[Row] = []
    for kind in KINDS:
        for mode in MODES:
            where = (asked.kinds == kind) & (asked.modes == mode)
            if not where.any():
                continue
            values, clusters = asked.per_fact(where)
            for role, hit in values.items():
                rate = clustered_rate(hit, clusters)
                rows.append(
                    {
                        "part": part, "kind": kind, "mode": mode, "model": role, "rate": rate.value,
                        "low": rate.low, "high": rate.high, "n": rate.n,
                    }
                )  # fmt: skip
    return rows
