"""Plain forgetting and utility of language models: are facts still answered (checklist A1, D1)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from palimpsest.audit.answers import rouge_score
from palimpsest.audit.attacks.knowledge import known, measured
from palimpsest.audit.language.asked import (
    Question,
    all_answers,
    hits,
    language_of,
    questions,
    replies,
    scores,
)
from palimpsest.audit.memorisation import exact_memorisation, extraction_strength
from palimpsest.audit.verdict import TOKEN_SPREAD
from palimpsest.core.auditing import audit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.intervals import clopper_pearson
from palimpsest.core.scale import SEED_SPREAD
from palimpsest.tasks.scoring import Scores


@audit("recall", code="A1", tasks=("language",))
@dataclass(frozen=True)
class Recall:
    """Ask the plain questions: greedy answers, probability of the true answer, memorisation; and utility.

    A reply counts if it names the answer or one of its aliases as whole words. Probability is that of the
    true answer per token, exp of the mean log-probability; exact memorisation the share of its tokens that
    are the likeliest; extraction strength how late they all begin to be. All come from one pass that scores
    answer, paraphrase and wrong answers of each question, and one that generates.

    Retained and test questions measure utility; test questions are worded as no training record is.
    """

    def run(self, evidence: Evidence) -> Outcome:
        """Findings on forget, retain and test questions, and a table of replies."""
        language_of(evidence)
        asked = questions(evidence, "forget")
        given = {role: replies(evidence, role, asked) for role in evidence.roles}
        right = {role: hits(asked, texts).astype(np.float64) for role, texts in given.items()}
        findings = [
            known(evidence, "recall", "forget_hit", right, "greedy replies", "outputs", SEED_SPREAD),
            *_likelihoods(evidence, asked),
            _overlap(evidence, asked, given),
            *_change(evidence),
        ]
        for part in ("retain", "test"):
            if evidence.has(part):
                findings += _utility(evidence, part)
        return Outcome(tuple(findings), {"replies": tuple(_rows(evidence, asked, given, right))})


def _likelihoods(evidence: Evidence, asked: Sequence[Question]) -> list[Finding]:
    """Probability, memorisation and extraction strength of the true answers."""
    own = {
        role: _own(scores(evidence, role, asked, [all_answers(item) for item in asked]))
        for role in evidence.roles
    }
    log_p = {role: -item.mean.double().numpy() for role, item in own.items()}
    probability = {role: np.exp(values) for role, values in log_p.items()}
    # the last token ends the answer and says nothing of the fact
    inner = {role: _without_last(item) for role, item in own.items()}
    exact = {role: exact_memorisation(*parts).nan_to_num(0).numpy() for role, parts in inner.items()}
    strength = {role: extraction_strength(*parts).nan_to_num(0).numpy() for role, parts in inner.items()}
    per_token = "of the true answer, per token"
    return [
        known(evidence, "recall", "forget_probability", probability, per_token, "outputs"),
        known(
            evidence, "recall", "forget_log_probability", log_p, f"{per_token}, in nats", prior=TOKEN_SPREAD
        ),
        known(evidence, "recall", "forget_exact_memorisation", exact, "share of the answer's tokens"),
        known(evidence, "recall", "forget_extraction_strength", strength, "1 - k/n"),
    ]


def _own(found: Sequence[Scores]) -> Scores:
    """Scores of the first answer of every question, padded to one width."""
    width = max(int(item.mask[0].sum()) for item in found)

    def stacked(name: str) -> torch.Tensor:
        rows = [getattr(item, name)[0, :width] for item in found]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return Scores(stacked("losses"), stacked("right"), stacked("mask"))


def _without_last(own: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """Hits and mask without the last token of each answer."""
    last = own.mask.sum(1) - 1
    mask = own.mask & (torch.arange(own.mask.shape[1]) != last[:, None])
    return own.right & mask, mask


def _overlap(
    evidence: Evidence, asked: Sequence[Question], given: Mapping[str, Sequence[Sequence[str]]]
) -> Finding:
    """ROUGE-L recall of greedy replies."""
    gold = [item.answer for item in asked]
    recall = {
        role: np.array([item.recall for item in rouge_score([text[0] for text in texts], gold, stem=True)])
        for role, texts in given.items()
    }
    return known(evidence, "recall", "forget_rouge", recall, "ROUGE-L recall with stemming")


def _change(evidence: Evidence) -> list[Finding]:
    """Largest change of a token's log-probability from the original, on forget and retain: 0 for its copy."""
    if evidence.original is None:
        return []
    parts = [part for part in ("forget", "retain") if evidence.has(part)]
    changes: dict[str, float] = {}
    for role in evidence.roles:
        gaps = [
            (evidence.observe(role, part).logits - evidence.observe(ORIGINAL, part).logits).abs().max()
            for part in parts
        ]
        changes[role] = float(torch.stack(gaps).max())
    note = "largest change of a token's log-probability from the original, in nats"
    return [measured(evidence, "recall", "max_change", changes, note)]


def _utility(evidence: Evidence, part: str) -> list[Finding]:
    """Share of a part's questions that are answered, and their probability."""
    asked = questions(evidence, part)
    right = {role: hits(asked, replies(evidence, role, asked)) for role in evidence.roles}
    rate = {role: float(values.mean()) for role, values in right.items()}
    low, high = clopper_pearson(int(right[UNLEARNED].sum()), len(asked))
    hit = measured(evidence, "recall", f"{part}_hit", rate, "greedy replies", "utility")
    found = {
        role: scores(evidence, role, asked, [[item.answer] for item in asked]) for role in evidence.roles
    }
    probability = {
        role: float(np.mean([float(torch.exp(-item.mean[0])) for item in items]))
        for role, items in found.items()
    }
    note = "of the true answer, per token"
    return [
        replace(hit, low=low, high=high, n=len(asked), bears="utility"),
        measured(evidence, "recall", f"{part}_probability", probability, note, "utility"),
    ]


def _rows(
    evidence: Evidence,
    asked: Sequence[Question],
    given: Mapping[str, Sequence[Sequence[str]]],
    right: Mapping[str, NDArray[np.float64]],
) -> list[Row]:
    """What every model said, question by question."""
    return [
        {
            "fact": item.fact,
            "question": item.question,
            "answer": item.answer,
            "model": role,
            "reply": given[role][at][0],
            "right": bool(right[role][at]),
        }
        for role in evidence.roles
        for at, item in enumerate(asked)
    ]
