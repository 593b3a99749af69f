"""RWKU's scores as an audit: probes of three levels, membership of fragments, neighbours, and utility.

Jin et al. 2024, arXiv 2406.10890.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from palimpsest.audit.answers import NO_ANSWER, cut_at, rouge_unique_words
from palimpsest.audit.attacks.knowledge import known, measured
from palimpsest.audit.language.asked import language_of, plainly, replies, scores
from palimpsest.audit.membership import language_signals as signals
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome, Row
from palimpsest.core.intervals import mean_interval
from palimpsest.suites.rwku_probes import Asked, forget_probes, is_published, neighbour_probes
from palimpsest.suites.rwku_scores import KINDS, LEVELS, Probe, recall
from palimpsest.suites.rwku_side_scores import FEWEST_TOKENS, mean_fluency, token_f1

STOPS = ("<|eot_id|>", "\n")
"""Where an answer ends."""
SHORT = {"1": "fb", "2": "qa", "3": "aa"}
MEMBERS = {"fm": "forget", "rm": "retain"}
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Given:
    """What all models answered to a list of probes.

    Attributes:
        probes: As they were asked.
        texts: Answers by role, [probes].
        values: Recall by role, [probes].
    """

    probes: tuple[Asked, ...]
    texts: dict[str, list[str]]
    values: dict[str, Values]

    def of(self, mask: NDArray[np.bool_]) -> dict[str, Values]:
        """Recall of some of them."""
        return {role: values[mask] for role, values in self.values.items()}


@audit("rwku", code="A1", tasks=("language",), default=False)
@dataclass(frozen=True)
class Rwku:
    """Fill-in-the-blank, questions, nine adversarial kinds, four membership attacks, neighbours and utility.

    Recall is that of the package rouge (case and punctuation count), x 100. Only probes that the original
    answers in full are asked ("before" filtering), as the published ones were chosen by what Llama-3 answers;
    its own recall is given as `before_...`, and a level or kind in which that is less than `telling` says
    nothing of forgetting: it is called invalid, and has no part in "aa" and "all". These pool over probes; the
    mean over targets stands in the note of "all". Where a probe offers options, the chance of guessing stands in the note.

    Membership attacks have no non-members and no area under a curve here: they are means over fragments
    about targets (FM) and others (RM), -100 times the log-likelihood (and the like), so that higher means less
    memorised. FM should rise, RM stay.

    Utility is measured by what is at hand: token F1 of open questions and choice by likelihood of the answer,
    both without the examples that the released code puts in front; fluency is the n-gram entropy of texts that
    the model writes. BBH needs worked reasoning that the data do not hold: it is left to an evaluation harness.

    Attributes:
        instructions: Whether the protocol's instruction, label and cue go around published probes; the models
            of the generated world cannot follow any.
        filter: Whether only what the original answers is asked.
        telling: Share that the original must answer for a level or kind to be valid.
        each: Prompts per fact and adversarial kind, where they are built.
        new_tokens: Of an answer.
        k: Share of tokens of Min-K% and Min-K%++.
        items: Of each utility set at most.
        fluency_tokens: Of a text whose fluency is measured.
    """

    instructions: bool = True
    filter: bool = True
    telling: float = 0.6
    each: int = 1
    new_tokens: int = 30
    k: float = 0.2
    items: int = 200
    fluency_tokens: int = 64

    def __post_init__(self) -> None:
        if min(self.each, self.new_tokens, self.items, self.fluency_tokens) < 1:
            raise InvalidAudit(f"each, new_tokens, items and fluency_tokens must be at least 1: {self}.")
        if not 0 <= self.telling <= 1 or not 0 < self.k <= 1:
            raise InvalidAudit(f"telling lies in [0, 1] and k in (0, 1]: {self}.")

    def run(self, evidence: Evidence) -> Outcome:
        """All scores, and rows by probe and by target."""
        language_of(evidence)
        given = self._ask(evidence, forget_probes(evidence, self.instructions, self.each))
        answered = self._kept(evidence, given)
        kept = answered & ~self._dropped(given)
        findings = [*self._levels(evidence, given, answered, kept), *self._kinds(evidence, given, answered)]
        findings += self._neighbours(evidence)
        findings += _compared(findings)
        findings += self._members(evidence)
        findings += self._utility(evidence)
        series = {"rwku": tuple(_rows(given, kept)), "rwku_targets": tuple(_by_target(given, kept))}
        return Outcome(tuple(findings), series)

    def _ask(self, evidence: Evidence, probes: Sequence[Asked]) -> Given:
        """Answers of every model; probes of one shape are generated together."""
        groups: dict[tuple[str, bool], list[int]] = defaultdict(list)
        for at, probe in enumerate(probes):
            groups[probe.opening, probe.raw].append(at)
        texts = {role: [""] * len(probes) for role in evidence.roles}
        for role in evidence.roles:
            for (opening, raw), chosen in groups.items():
                prompts = [probes[at].prompt for at in chosen]
                found = replies(
                    evidence, role, prompts, opening=opening, raw=raw, max_new_tokens=self.new_tokens
                )
                for at, answers in zip(chosen, found, strict=True):
                    texts[role][at] = cut_at(answers[0], STOPS)
        gold = [probe.answer for probe in probes]
        values = {
            role: np.array([item.recall for item in rouge_unique_words(said, gold, NO_ANSWER)], float)
            for role, said in texts.items()
        }
        return Given(tuple(probes), texts, values)

    def _kept(self, evidence: Evidence, given: Given) -> NDArray[np.bool_]:
        """Which probes are asked: those that the original answers in full."""
        if not self.filter or evidence.original is None:
            return np.ones(len(given.probes), bool)
        kept = given.values[ORIGINAL] >= 1
        if not kept.any():
            raise InvalidAudit(
                f"The original answers none of {len(kept)} probes in full: nothing can be forgotten. "
                "Set filter=false to score them all the same."
            )
        return kept

    def _dropped(self, given: Given) -> NDArray[np.bool_]:
        """Probes of the levels and kinds that the original cannot be asked in."""
        shapes = np.array([probe.kind or SHORT[probe.level] for probe in given.probes])
        dropped = np.zeros(len(shapes), bool)
        for shape in np.unique(shapes) if ORIGINAL in given.values else ():
            dropped |= (shapes == shape) & (given.values[ORIGINAL][shapes == shape].mean() < self.telling)
        return dropped

    def _levels(
        self,
        evidence: Evidence,
        given: Given,
        answered: NDArray[np.bool_],
        kept: NDArray[np.bool_],
    ) -> list[Finding]:
        """FB and QA, and pooled over what the original can be asked in AA and all."""
        levels = np.array([probe.level for probe in given.probes])
        findings = [
            finding
            for level in ("1", "2")
            for finding in self._group(
                evidence, SHORT[level], given, levels == level, answered, LEVELS[level]
            )
        ]
        kinds = {probe.kind for probe, mine in zip(given.probes, kept, strict=True) if mine and probe.kind}
        built = {probe.kind for probe in given.probes if probe.kind}
        what = f"adversarial probes of {len(kinds)} of {len(built)} kinds"
        findings += self._group(evidence, "aa", given, levels == "3", kept, what, whole=False)
        every = self._group(evidence, "all", given, levels != "", kept, "all probes", whole=False)
        if every[0].value is not None:
            mean = recall(_probes(given, UNLEARNED, kept)).all.by_subject
            every[0] = replace(
                every[0], note=f"{every[0].note}; mean over targets {mean:.1f}", bears="outputs"
            )
        return [*findings, *every]

    def _kinds(self, evidence: Evidence, given: Given, answered: NDArray[np.bool_]) -> list[Finding]:
        kinds = np.array([probe.kind for probe in given.probes])
        return [
            finding
            for kind in KINDS
            if (kinds == kind).any()
            for finding in self._group(evidence, _name(kind), given, kinds == kind, answered, f"kind {kind}")
        ]

    def _group(
        self,
        evidence: Evidence,
        name: str,
        given: Given,
        inside: NDArray[np.bool_],
        kept: NDArray[np.bool_],
        what: str,
        whole: bool = True,
    ) -> list[Finding]:
        """Recall of a group of probes, and what the original makes of all of them.

        `whole` groups are invalid where the original answers too few; of others such kinds were dropped.
        """
        if not inside.any():
            return [
                Finding("rwku", name, None, judgement=Judgement.NOT_RUN, note=f"there is no probe: {what}")
            ]
        chance = [
            probe.chance for probe, mine in zip(given.probes, inside, strict=True) if mine and probe.chance
        ]
        said = f"recall of {what}, x 100"
        if chance:
            said += f"; chance {100 * float(np.mean(chance)):.0f}"
        before = {ORIGINAL: given.values[ORIGINAL][inside]} if ORIGINAL in given.values else {}
        findings: list[Finding] = []
        asked = inside & kept
        if not asked.any():
            why = f"the original cannot be asked with these {inside.sum()} probes: {what}"
            findings.append(
                Finding(
                    "rwku",
                    name,
                    None,
                    valid=False,
                    judgement=Judgement.INVALID,
                    more_is="knowledge",
                    note=why,
                )
            )
        else:
            found = known(
                evidence, "rwku", name, given.of(asked), f"{said}; {asked.sum()} of {inside.sum()} probes"
            )
            findings.append(_percent(found))
        if before:
            rate = float(before[ORIGINAL].mean())
            if whole and rate < self.telling and asked.any():
                why = f"{findings[0].note}; the original answers {100 * rate:.0f} only, so it tells nothing"
                findings[0] = replace(findings[0], valid=False, k=None, judgement=Judgement.INVALID, note=why)
            note = f"recall of the original on {what}, before filtering"
            findings.append(Finding("rwku", f"before_{name}", 100 * rate, n=int(inside.sum()), note=note))
        return findings

    def _neighbours(self, evidence: Evidence) -> list[Finding]:
        """FB and QA of neighbours, filtered in the same way."""
        probes = neighbour_probes(evidence, self.instructions)
        if not probes:
            return [
                Finding(
                    "rwku", "neighbour_all", None, judgement=Judgement.NOT_RUN, note="no neighbour is known"
                )
            ]
        given = self._ask(evidence, probes)
        kept = self._kept(evidence, given)
        levels = np.array([probe.level for probe in probes])
        findings: list[Finding] = []
        for name, inside in (("fb", levels == "1"), ("qa", levels == "2"), ("all", levels != "")):
            asked = inside & kept
            if not asked.any():
                continue
            values = given.of(asked)
            means = {role: float(value.mean()) for role, value in values.items()}
            note = f"recall of {asked.sum()} of {inside.sum()} probes about neighbours, x 100"
            found = measured(evidence, "rwku", f"neighbour_{name}", means, note, "utility")
            low, high = mean_interval(values[UNLEARNED], evidence.runtime.numpy("rwku", "neighbour", name))
            found = replace(found, low=low, high=high, n=int(asked.sum()))
            findings.append(_percent(replace(found, bears="utility") if name == "all" else found))
        return findings

    def _members(self, evidence: Evidence) -> list[Finding]:
        """LOSS, Zlib, Min-K% and Min-K%++ of fragments about targets and about others, and how they rise."""
        findings: list[Finding] = []
        exposed: dict[str, dict[str, dict[str, float]]] = {}
        for name, about in MEMBERS.items():
            given = {role: self._exposure(evidence, role, about) for role in evidence.roles}
            found = {role: item for role, item in given.items() if item is not None}
            if len(found) < len(given):
                whom = "targets" if name == "fm" else "others"
                why = f"there are no fragments of {FEWEST_TOKENS} tokens about {whom}"
                findings.append(Finding("rwku", f"{name}_loss", None, judgement=Judgement.NOT_RUN, note=why))
                continue
            exposed[name] = found
            for attack in ("loss", "zlib", "min_k", "min_k_plus_plus"):
                values = {role: item[attack] for role, item in found.items()}
                note = "-100 times the mean over fragments: higher is less memorised"
                finding = measured(evidence, "rwku", f"{name}_{attack}", values, note)
                findings.append(replace(finding, n=int(found[UNLEARNED]["n"])))
        return [*findings, *(_rises(exposed) if len(exposed) == 2 and evidence.original is not None else ())]

    def _exposure(self, evidence: Evidence, role: str, about: str) -> dict[str, float] | None:
        """The four attacks on a model, x -100; None where there are no fragments."""
        part = "test" if is_published(evidence) else about
        if not evidence.has(part):
            return None
        records = evidence.records(part)
        tokens = evidence.observe(role, part).tokens
        inside = np.array(
            [isinstance(item.get("text"), str) and "question" not in item for item in records], bool
        )
        if is_published(evidence):
            inside &= records.column("form") == f"{about} member"
        elif records.has_column("group"):
            inside &= np.isin(records.column("group"), ["people", "neighbours"])
        long = (tokens["mask"].sum(1) >= FEWEST_TOKENS).numpy()
        at = np.flatnonzero(inside & long)
        if not len(at):
            return None
        own, mask = tokens["log_probability"][at], tokens["mask"][at].bool()
        deviation = tokens["deviation"][at].clamp(min=1e-6)
        standard = (own - tokens["mean"][at]) / deviation
        texts = [str(item["text"]) for item in records.select(at)]
        values = {
            "loss": signals.mean_log_probabilities(own, mask),
            "zlib": signals.zlib_scores(own, mask, texts),
            "min_k": signals.min_k_scores(own, mask, self.k),
            "min_k_plus_plus": signals.min_k_scores(standard, mask, self.k),
        }
        means = {name: -100 * float(torch.as_tensor(value).double().mean()) for name, value in values.items()}
        return {**means, "n": float(len(at))}

    def _utility(self, evidence: Evidence) -> list[Finding]:
        """Open questions, choices and fluency, where data for them are at hand."""
        if not evidence.has("test"):
            return []
        test = evidence.split.parts["test"]
        group = test.column("group") if test.has_column("group") else np.array([""] * len(test), object)
        form = test.column("form") if test.has_column("form") else np.array([""] * len(test), object)
        published = is_published(evidence)

        def items(name: str, world: str) -> list[dict[str, object]]:
            mask = form == f"utility {name}" if published else group == world
            return list(test.select(np.flatnonzero(mask)[: self.items]))

        findings: list[Finding] = []
        for name, source, ask in (
            ("factuality", "factuality", self._factuality), ("general", "general", self._choices),
            ("truthfulness", "truthfulness", self._choices), ("fluency", "fluency", self._fluency),
        ):  # fmt: skip
            if name == "truthfulness" and not published:
                continue  # the world has no popular errors
            found = items(source, "general" if name == "fluency" else "world")
            if found:
                findings.append(_utility(evidence, name, ask, found))
        return findings

    def _factuality(self, evidence: Evidence, role: str, items: Sequence[dict[str, object]]) -> Values:
        asked = [plainly(item) for item in items]
        given = replies(evidence, role, asked, max_new_tokens=self.new_tokens)
        return np.array(
            [token_f1(cut_at(text[0], STOPS), item.accepted) for text, item in zip(given, asked, strict=True)]
        )

    def _choices(self, evidence: Evidence, role: str, items: Sequence[dict[str, object]]) -> Values:
        """Whether the right choice is the likeliest per token."""
        asked = [question for question in map(plainly, items) if question.wrong]
        if not asked:
            return np.array([])
        found = scores(evidence, role, asked, [[item.answer, *item.wrong] for item in asked])
        return np.array([float(item.mean.argmin() == 0) for item in found])

    def _fluency(self, evidence: Evidence, role: str, items: Sequence[dict[str, object]]) -> Values:
        """Entropy of n-grams of what a model writes after an instruction, or after the beginning of a text."""
        texts = [str(item["text"]) for item in items]
        raw = not is_published(evidence)
        prompts = [" ".join(text.split()[:4]) for text in texts] if raw else texts
        given = replies(evidence, role, prompts, raw=raw, max_new_tokens=self.fluency_tokens)
        return np.array(mean_fluency([text[0] for text in given])[1])


def _compared(findings: Sequence[Finding]) -> list[Finding]:
    """Attacks against questions, and what neighbours lost against what targets lost."""
    value = {item.name: item.value for item in findings}
    original = {item.name: item.original for item in findings}
    made: list[Finding] = []
    attacks, asked = value.get("aa"), value.get("qa")
    if attacks is not None and asked is not None:
        note = "recall of adversarial probes minus that of questions, in points"
        made.append(Finding("rwku", "aa_minus_qa", attacks - asked, note=note))
    lost = _lost(value.get("all"), original.get("all"))
    near = _lost(value.get("neighbour_all"), original.get("neighbour_all"))
    if lost is not None and near is not None and lost > 0:
        note = "points that neighbours lost, as a share of what the targets lost"
        made.append(Finding("rwku", "neighbour_share_of_drop", near / lost, ideal=0.0, note=note))
    return made


def _lost(value: float | None, original: float | None) -> float | None:
    return None if value is None or original is None else original - value


def _rises(exposed: dict[str, dict[str, dict[str, float]]]) -> list[Finding]:
    """How the LOSS signal of fragments about targets rose over the original's, and that of others."""
    before = {name: found[ORIGINAL]["loss"] for name, found in exposed.items()}
    rise = {name: found[UNLEARNED]["loss"] - before[name] for name, found in exposed.items()}
    told = {
        "fm_minus_rm": (rise["fm"] - rise["rm"], "rise of LOSS about targets minus that about others"),
        "fm_rise": (rise["fm"] / before["fm"] if before["fm"] > 0 else None, "rise of FM's LOSS as a share of it"),
        "rm_share": (rise["rm"] / rise["fm"] if rise["fm"] > 0 else None, "rise of LOSS about others, as a share of that about targets"),
    }  # fmt: skip
    return [Finding("rwku", name, value, note=note) for name, (value, note) in told.items()]


def _utility(
    evidence: Evidence,
    name: str,
    ask: Callable[[Evidence, str, Sequence[dict[str, object]]], Values],
    items: Sequence[dict[str, object]],
) -> Finding:
    values = {role: ask(evidence, role, items) for role in evidence.roles}
    if not len(values[UNLEARNED]):
        return Finding("rwku", name, None, judgement=Judgement.NOT_RUN, note="no question has choices")
    means = {role: float(value.mean()) for role, value in values.items()}
    low, high = mean_interval(values[UNLEARNED], evidence.runtime.numpy("rwku", name))
    found = measured(evidence, "rwku", name, means, "x 100, as the paper prints it", "utility")
    return _percent(replace(found, low=low, high=high, n=len(values[UNLEARNED])))


def _percent(finding: Finding) -> Finding:
    """The finding with values x 100, as RWKU prints them."""

    def times(value: float | None) -> float | None:
        return None if value is None else 100 * value

    return replace(
        finding, value=times(finding.value), low=times(finding.low), high=times(finding.high),
        original=times(finding.original), controls=tuple(100 * value for value in finding.controls),
    )  # fmt: skip


def _name(kind: str) -> str:
    return kind.replace(" ", "_").replace("-", "_")


def _probes(given: Given, role: str, kept: NDArray[np.bool_]) -> list[Probe]:
    return [
        Probe(probe.subject, probe.level, probe.kind, probe.answer, text)
        for probe, text, mine in zip(given.probes, given.texts[role], kept, strict=True)
        if mine
    ]


def _rows(given: Given, kept: NDArray[np.bool_]) -> list[Row]:
    """Every probe and answer."""
    return [
        {
            "subject": probe.subject, "level": LEVELS[probe.level], "kind": probe.kind, "model": role,
            "prompt": probe.prompt, "answer": probe.answer, "said": given.texts[role][at],
            "recall": float(values[at]), "asked": bool(kept[at]), "chance": probe.chance,
        }
        for role, values in given.values.items()
        for at, probe in enumerate(given.probes)
    ]  # fmt: skip


def _by_target(given: Given, kept: NDArray[np.bool_]) -> list[Row]:
    """Recall of every target, over all its probes, with their number."""
    rows: list[Row] = []
    for role in given.values:
        for subject, group in recall(_probes(given, role, kept)).subjects.items():
            rows.append({"subject": subject, "model": role, "recall": group.pooled, "n": group.n})
    return rows
