"""TOFU's metrics and six membership attacks on one model: shared passes against every metric on its own.

Run: python benchmarks/tofu_suite.py [--people 60] [--width 128]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import palimpsest as pal
from palimpsest.audit.answers import rouge_score
from palimpsest.audit.language.asked import Question, all_answers
from palimpsest.audit.membership import language_signals as signals
from palimpsest.audit.membership.privacy_leak import privacy_auc, privacy_leak, privacy_signals
from palimpsest.audit.memorisation import memorisation
from palimpsest.audit.truth_ratio import forget_quality, truth_probabilities, truth_ratios
from palimpsest.core.evidence import UNLEARNED, Evidence
from palimpsest.core.intervals import auc
from palimpsest.data import load_data
from palimpsest.suites.tofu_audit import Answered, Tofu, answered, first_answers, question_sets
from palimpsest.suites.tofu_scores import (
    UTILITY_SETS,
    SetLosses,
    model_utility,
    ratios_by_item,
    set_scores,
)
from palimpsest.tasks.language import Language

NEW_TOKENS = 32
K = 0.4
BATCH = 16
SETS = ("forget", *UTILITY_SETS)
Values = dict[str, float]


def asked_sets(evidence: Evidence) -> dict[str, list[Question]]:
    sets = question_sets(evidence, None)
    holdout = evidence.split.holdout
    assert holdout is not None
    held = pal.ForgetSplit(holdout, evidence.split.retain)
    return {**sets, "holdout": question_sets(Evidence(evidence.unlearned, held, evidence.task), None)["forget"]}


class Passes:
    """Counts questions and answers that a model reads."""

    def __init__(self) -> None:
        self.sequences = 0
        self.generated = 0


def shared(evidence: Evidence, sets: dict[str, list[Question]], reference: Values | None) -> Values:
    """Everything from one scoring and one generating pass per set, and one observing pass for the attacks."""
    found = {name: answered(evidence, UNLEARNED, sets[name], NEW_TOKENS) for name in SETS}
    result = metrics(found)
    seen = {
        name: evidence.observe(UNLEARNED, name).tokens for name in ("forget", "holdout")
    }
    result |= attacks(evidence, sets, seen)
    return result
