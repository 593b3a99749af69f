"""MUSE's scores of one model as an audit: verbatim and knowledge memorisation, privacy leakage, utility (C1 to C4).

Shi et al. 2025, arXiv 2407.06460. Scalability (C5) and sustainability (C6) are the same scores over several
requests: see `palimpsest.suites.muse`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import nn

from palimpsest.audit.attacks.knowledge import known, measured
from palimpsest.audit.language.asked import language_of, replies
from palimpsest.audit.membership.privacy_leak import Signals, measure_privacy_leak, privacy_signals
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit, ModelMismatch
from palimpsest.core.evidence import UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome, Row
from palimpsest.core.intervals import mean_interval
from palimpsest.core.records import Records
from palimpsest.core.split import ForgetSplit
from palimpsest.suites.muse_scores import (
    KNOWMEM_TOKENS,
    SHOTS,
    VERBMEM_TOKENS,
    Memorised,
    cut_to_tokens,
    knowmem,
    knowmem_prompt,
    verbmem,
)
from palimpsest.tasks.language import Language, plain_questions

ITEMS = 100
"""Of each set, in the published protocol."""
Pair = tuple[str, str]
"""A prompt and its continuation, or a question and its answer."""


@dataclass(frozen=True)
class MuseSets:
    """What MUSE asks, of a split with the published files or of a generated world.

    Published files have all of it in records of their own (see `palimpsest.data.muse`). In the generated world
    running text is what has a "text": its first half is the prompt of VerbMem; KnowMem asks the plain
    questions of the forget records, and for retained data the questions of part "test", which are worded as
    no training record is; documents are the forget texts, and those of people whom no model has seen.

    Attributes:
        split: The request.
        limit: Items of each set at most.
        shots: Solved examples before a question; 0 asks in the template of the task.
    """

    split: ForgetSplit
    limit: int = ITEMS
    shots: int = SHOTS

    @cached_property
    def published(self) -> bool:
        """Whether the records are of the published files."""
        test = self.split.test
        return test is not None and test.has_column("form") and bool((test.column("form") == "verbmem").any())

    @cached_property
    def verbatim(self) -> list[Pair]:
        """Prompts of running text to forget, with what follows them."""
        if self.published:
            items = self._of("test", "verbmem", "forget")
            return [(item["prompt"], item["continuation"]) for item in items][: self.limit]
        return [halves(item["text"]) for item in self.split.forget if _running(item)][: self.limit]

    @cached_property
    def forget_questions(self) -> list[Pair]:
        """Questions about what is to be forgotten."""
        if self.published:
            return _pairs(self._of("test", "knowmem", "forget"))[: self.limit]
        forget = self.split.forget
        return _pairs(forget.select(plain_questions(forget)))[: self.limit]

    @cached_property
    def retain_questions(self) -> list[Pair]:
        """Questions about what is retained and no method may train on in these words."""
        if self.published:
            return _pairs(self._of("test", "knowmem", "retain2"))[: self.limit]
        test = self.split.test
        if test is None:
            raise InvalidAudit(
                "MUSE's utility needs questions about retained data in a test part; there is none."
            )
        mask = np.ones(len(test), bool)
        if test.has_column("group"):
            mask &= np.isin(test.column("group"), ["people", "neighbours"])
        retain = self.split.retain
        if retain is not None and test.has_column("subject") and retain.has_column("subject"):
            # of requests in turn, people whom earlier ones took are no longer retained
            mask &= np.isin(test.column("subject"), sorted(set(retain.column("subject"))))
        asked = test.select(mask)
        found = _pairs(asked)
        # evenly over the people, so that a limit does not ask for the first ones alone
        step = max(1, len(found) // self.limit)
        return found[::step][: self.limit]

    def examples(self, about: str) -> list[Pair]:
        """Solved examples before questions about "forget" or "retain"; never questions that are asked.

        Raises:
            InvalidAudit: If shots are asked for and there are fewer.
        """
        if self.shots == 0:
            return []
        if self.published:
            found = _pairs(self._of("test", "examples", "forget" if about == "forget" else "retain2"))
        else:
            found = [] if self.split.retain is None else _pairs(_plain(self.split.retain))
        asked = {question for question, _ in [*self.forget_questions, *self.retain_questions]}
        found = [pair for pair in found if pair[0] not in asked][: self.shots]
        if len(found) < self.shots:
            raise InvalidAudit(
                f"KnowMem asks after {self.shots} solved examples, {len(found)} are at hand: set shots=0 to ask without."
            )
        return found

    def documents(self) -> dict[str, tuple[str, np.ndarray]]:
        """Part and positions of the documents of PrivLeak, by side ("forget", "holdout")."""
        wanted = {"forget": ("forget", None), "holdout": ("holdout", None)}
        if self.published:
            wanted = {"forget": ("test", "forget"), "holdout": ("holdout", "holdout")}
        found: dict[str, tuple[str, np.ndarray]] = {}
        for side, (part, role) in wanted.items():
            records = self.split.parts.get(part)
            if records is None:
                found[side] = (part, np.array([], np.int64))
                continue
            mask = np.array([_running(item) for item in records], bool)
            if role is not None:
                mask &= (records.column("form") == "privleak") & (records.column("role") == role)
            found[side] = (part, np.flatnonzero(mask)[: self.limit])
        return found

    def _of(self, part: str, form: str, role: str) -> Records:
        records = self.split.parts[part]
        return records.select((records.column("form") == form) & (records.column("role") == role))


@audit("muse", code="A1", tasks=("language",), default=False)
@dataclass(frozen=True)
class Muse:
    """Verbatim and knowledge memorisation, privacy leakage and utility, as MUSE defines them (x 100).

    VerbMem: ROUGE-L F1 of greedily continued running text. KnowMem: the same of answers to questions about
    forget and about retained data, the latter being utility. PrivLeak: Min-K% of forget documents against
    those of documents never seen, relative to the first control; 0 as retrained, -100 as known by heart,
    above 0 over-unlearned. It is not run without a retrained model. Whoever scores 0 on the first two by
    writing nonsense has no utility either: read them together.

    The models are scored in their own precision; the released code loads them in 8 bits for all but PrivLeak.

    Attributes:
        shots: Solved examples before every question, as published; 0 asks in the task's template, for small
            models that have never seen several questions in a row.
        items: Of each set at most.
        verbatim_tokens: To generate, and of the true continuation to compare with.
        answer_tokens: To generate for an answer.
        k: Share of tokens of Min-K%.
    """

    shots: int = SHOTS
    items: int = ITEMS
    verbatim_tokens: int = VERBMEM_TOKENS
    answer_tokens: int = KNOWMEM_TOKENS
    k: float = 0.4

    def __post_init__(self) -> None:
        least = {"shots": 0, "items": 2, "verbatim_tokens": 1, "answer_tokens": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InvalidAudit(f"{name} is at least {low}, not {getattr(self, name)}.")
        if not 0 < self.k <= 1:
            raise InvalidAudit(f"k lies in (0, 1], not {self.k}.")

    def run(self, evidence: Evidence) -> Outcome:
        """The four scores of every model, and a row per item."""
        language_of(evidence)
        sets = MuseSets(evidence.split, self.items, self.shots)
        self._check_lengths(evidence, sets)
        rows: list[Row] = []
        findings: list[Finding] = []
        for name, kept in (("verbmem", False), ("knowmem_forget", False), ("knowmem_retain", True)):
            pairs, found = self._memorised(evidence, sets, name)
            if not pairs:
                why = (
                    "the forget records hold no running text" if name == "verbmem" else "there is no question"
                )
                findings.append(Finding("muse", name, None, judgement=Judgement.NOT_RUN, note=why))
                continue
            findings.append(_utility(evidence, found) if kept else _memory(evidence, name, found))
            rows += _rows(name, pairs, found)
        findings += self._leak(evidence, sets)
        return Outcome(tuple(findings), {"muse": tuple(rows)})

    def _memorised(
        self, evidence: Evidence, sets: MuseSets, name: str
    ) -> tuple[list[Pair], dict[str, Memorised]]:
        """What every model wrote in one of the sets, compared."""
        if name == "verbmem":
            pairs = sets.verbatim
        else:
            pairs = sets.forget_questions if name == "knowmem_forget" else sets.retain_questions
        found: dict[str, Memorised] = {}
        for role in evidence.roles if pairs else ():
            found[role] = self.scored(evidence, role, sets, name, pairs)
        return pairs, found

    def scored(
        self, evidence: Evidence, role: str, sets: MuseSets, name: str, pairs: Sequence[Pair]
    ) -> Memorised:
        """One model's score in one set."""
        task = language_of(evidence)
        if name == "verbmem":
            prompts = [prompt for prompt, _ in pairs]
            given = replies(evidence, role, prompts, raw=True, max_new_tokens=self.verbatim_tokens)
            truths = [cut_to_tokens(rest, task.encoder, self.verbatim_tokens) for _, rest in pairs]
            return verbmem([texts[0] for texts in given], truths)
        prompts, raw = knowmem_prompts(sets, pairs, name.removeprefix("knowmem_"))
        given = replies(evidence, role, prompts, raw=raw, max_new_tokens=self.answer_tokens)
        return knowmem([texts[0] for texts in given], [answer for _, answer in pairs])

    def _leak(self, evidence: Evidence, sets: MuseSets) -> list[Finding]:
        """PrivLeak against the first control, and the areas under the curve that it comes from."""
        places = sets.documents()
        short = [side for side, (_, positions) in places.items() if len(positions) < 2]
        missing = "" if evidence.controls else "a retrained model"
        missing = missing or (
            f"2 documents of running text a side, and has fewer of {' and '.join(short)}" if short else ""
        )
        if missing:
            why = f"PrivLeak needs {missing}"
            return [Finding("muse", "privacy_leak", None, judgement=Judgement.NOT_RUN, note=why)]

        def signals(role: str) -> tuple[Signals, Signals]:
            mine, theirs = (document_signals(evidence, role, *places[side], self.k) for side in places)
            return mine, theirs

        both = {role: signals(role) for role in evidence.roles}
        first = evidence.control_roles[0]
        leaks = {role: measure_privacy_leak(both[role], both[first]) for role in evidence.roles}
        own = leaks[UNLEARNED]
        note = f"Min-{100 * self.k:g}%, {own.forget} forget and {own.holdout} holdout documents, against the first control"
        if not own.fair:
            note += f"; forget and holdout differ by themselves (AUC of the control {own.retrained_auc:.2f})"
        count = own.forget + own.holdout
        leak = measured(
            evidence, "muse", "privacy_leak", {role: item.percent for role, item in leaks.items()}, note
        )
        areas = {role: item.auc for role, item in leaks.items()}
        area = measured(
            evidence, "muse", "privacy_auc", areas, "chance that a holdout document looks more like a member"
        )
        return [
            replace(leak, n=count, ideal=0.0),
            replace(area, low=own.low, high=own.high, n=count),
        ]

    def _check_lengths(self, evidence: Evidence, sets: MuseSets) -> None:
        """Refuse prompts that do not fit the context together with what is generated."""
        task = language_of(evidence)
        limit = getattr(getattr(evidence.unlearned, "config", None), "max_position_embeddings", None)
        if not limit:
            return
        whole = [(prompt, self.verbatim_tokens) for prompt, _ in sets.verbatim]
        for about, pairs in (("forget", sets.forget_questions), ("retain", sets.retain_questions)):
            prompts, raw = knowmem_prompts(sets, pairs, about)
            texts = prompts if raw else [task.form.render(text) for text in prompts]
            whole += [(text, self.answer_tokens) for text in texts]
        for text, new in whole:
            size = len(task.tokens(text, first=True))
            if size + new > limit:
                raise InvalidAudit(
                    f"A prompt of {size} tokens and {new} new ones do not fit the context of {limit}: {text[:60]!r}... "
                    "Lower shots, answer_tokens or verbatim_tokens."
                )


def knowmem_prompts(sets: MuseSets, pairs: Sequence[Pair], about: str) -> tuple[list[str], bool]:
    """What is put to the model, and whether it is the whole prompt, without a template around it."""
    shown = sets.examples(about)
    if not shown:
        return [question for question, _ in pairs], False
    return [knowmem_prompt(shown, question) for question, _ in pairs], True


def knowmem_of(model: nn.Module, split: ForgetSplit, task: Language, settings: Muse) -> float:
    """KnowMem on the forget data of a model by itself: what chooses a checkpoint."""
    sets = MuseSets(split, settings.items, settings.shots)
    pairs = sets.forget_questions
    if not pairs:
        raise InvalidAudit("KnowMem needs questions about the forget data; there is none.")
    prompts, raw = knowmem_prompts(sets, pairs, "forget")
    given = task.generate(model, prompts, raw=raw, max_new_tokens=settings.answer_tokens)
    return knowmem([texts[0] for texts in given], [answer for _, answer in pairs]).value


def document_signals(evidence: Evidence, role: str, part: str, positions: np.ndarray, k: float) -> Signals:
    """Min-K% signals of documents of a part, [documents], from the pass that all audits share.

    Raises:
        ModelMismatch: If the task measures no tokens.
    """
    records = evidence.records(part)
    wanted = set(evidence.split.parts[part].select(positions).ids)
    at = np.array([number for number, name in enumerate(records.ids) if name in wanted], np.int64)
    seen = evidence.observe(role, part).tokens
    if "log_probability" not in seen:
        raise ModelMismatch("PrivLeak needs log-probabilities of tokens.")
    return privacy_signals(seen["log_probability"][at], seen["mask"][at].bool(), k)


def halves(text: str) -> Pair:
    """A text cut in two after half of its words; white space is made one blank.

    Example:
        >>> halves("one two three four five")
        ('one two', 'three four five')
    """
    words = text.split()
    if len(words) < 2:
        raise InvalidAudit(f"A text of fewer than two words has no continuation: {text!r}.")
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


def _running(item: dict[str, object]) -> bool:
    return isinstance(item.get("text"), str) and item.get("question") is None


def _plain(records: Records) -> Records:
    return records.select(plain_questions(records))


def _pairs(records: Records | Sequence[dict[str, str]]) -> list[Pair]:
    return [(item["question"], item["answer"]) for item in records if item.get("question") is not None]


def _memory(evidence: Evidence, name: str, found: dict[str, Memorised]) -> Finding:
    """A score of memorisation on the scale K, printed x 100."""
    values = {role: np.array(item.f1) for role, item in found.items()}
    finding = known(evidence, "muse", name, values, "F1 of ROUGE-L, greedy, x 100", "outputs")
    return _percent(finding)


def _utility(evidence: Evidence, found: dict[str, Memorised]) -> Finding:
    own = np.array(found[UNLEARNED].f1)
    low, high = mean_interval(own, evidence.runtime.numpy("muse", "knowmem_retain"))
    values = {role: item.value / 100 for role, item in found.items()}
    note = "F1 of ROUGE-L of answers about retained data, x 100"
    finding = measured(evidence, "muse", "knowmem_retain", values, note, "utility")
    return _percent(replace(finding, low=low, high=high, n=len(own), bears="utility"))


def _percent(finding: Finding) -> Finding:
    """The finding with values x 100, as MUSE prints them."""

    def times(value: float | None) -> float | None:
        return None if value is None else 100 * value

    return replace(
        finding, value=times(finding.value), low=times(finding.low), high=times(finding.high),
        original=times(finding.original), controls=tuple(100 * value for value in finding.controls),
    )  # fmt: skip


def _rows(name: str, pairs: Sequence[Pair], found: dict[str, Memorised]) -> Iterator[Row]:
    for role, item in found.items():
        for (prompt, truth), f1, recall, said in zip(pairs, item.f1, item.recall, item.cut, strict=True):
            yield {
                "set": name, "model": role, "prompt": prompt, "truth": truth, "said": said,
                "f1": f1, "recall": recall,
            }  # fmt: skip
