"""Metric check: do the measures of knowledge tell models that have it from models that have not (checklist E5)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.audit.answers import rouge_score
from palimpsest.audit.attacks.knowledge import not_run
from palimpsest.audit.language.asked import Question, all_answers, hits, questions, replies, scores
from palimpsest.audit.memorisation import exact_memorisation, extraction_strength
from palimpsest.audit.metric_checks import faithfulness
from palimpsest.core.auditing import audit
from palimpsest.core.evidence import ORIGINAL, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.intervals import auc_interval

NAME = "metric-check"


@audit(NAME, code="E5", tasks=("language",))
@dataclass(frozen=True)
class MetricCheck:
    """Before a measure is trusted: is it larger for facts of the original than for the same facts of controls?

    Faithfulness (Dorna et al., OpenUnlearning, arXiv 2506.12618) is the AUC of a measure over models with the
    knowledge against models without. Within one study the models with it are the original, those without it the
    controls, and the measure is taken fact by fact: an AUC of 0.5 is a measure that says nothing here. Over
    many seeds `palimpsest.study.metric_check` does the same model by model, with robustness.
    """

    def run(self, evidence: Evidence) -> Outcome:
        """AUC of every measure with DeLong's interval."""
        if evidence.original is None or not evidence.controls:
            return not_run(NAME, "probability", "it needs the original and a retrained model")
        asked = questions(evidence, "forget")
        informed = measures(evidence, ORIGINAL, asked)
        ignorant = [measures(evidence, role, asked) for role in evidence.control_roles]
        findings: list[Finding] = []
        rows: list[Row] = []
        for name, values in informed.items():
            others = np.concatenate([item[name] for item in ignorant])
            _, low, high = auc_interval(values, others)
            value = faithfulness(values.tolist(), others.tolist())
            note = f"AUC of the original's {len(values)} facts against {len(others)} of the controls"
            findings.append(Finding(NAME, name, value, low, high, len(values), ideal=1.0, note=note))
            rows.append({"measure": name, "faithfulness": value, "low": low, "high": high})
        return Outcome(tuple(findings), {"measures": tuple(rows)})


def measures(evidence: Evidence, role: str, asked: Sequence[Question]) -> dict[str, NDArray[np.float64]]:
    """Measures of knowledge, each [questions]; more is more knowledge."""
    own = scores(evidence, role, asked, [all_answers(item) for item in asked])
    gold = [-float(item.mean[0]) for item in own]
    inner = [(item.right[:1, : _inner(item.mask[0])], item.mask[:1, : _inner(item.mask[0])]) for item in own]
    wrong = [float(np.mean(np.exp(-item.mean[2:].numpy()))) if len(item.mean) > 2 else 0.0 for item in own]
    given = replies(evidence, role, asked)
    overlap = rouge_score([texts[0] for texts in given], [item.answer for item in asked], stem=True)
    p = np.exp(np.array(gold))
    return {
        "hit": hits(asked, given).astype(np.float64),
        "probability": p,
        "probability_among_wrong": p / np.maximum(p + np.array(wrong), 1e-12),
        "exact_memorisation": np.array([float(exact_memorisation(*pair).nan_to_num(0)[0]) for pair in inner]),
        "extraction_strength": np.array(
            [float(extraction_strength(*pair).nan_to_num(0)[0]) for pair in inner]
        ),
        "rouge": np.array([item.recall for item in overlap]),
    }


def _inner(mask: Tensor) -> int:
    """Tokens of an answer without the one that ends it, at least one."""
    return max(int(mask.sum()) - 1, 1)
