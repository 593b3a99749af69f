"""The verdict of the language audits on models that are known to have forgotten, to hide, or to have done nothing."""

from __future__ import annotations

import pytest

from palimpsest.audit import examine
from palimpsest.audit.verdict import Verdict
from palimpsest.core.evidence import UNLEARNED

AUDITS = ("recall", "forms", "prompts", "sampling", "text-membership", "truthfulness", "text-side-effects")


@pytest.fixture
def verdict(evidence):
    def judge(model) -> Verdict:
        judged = evidence.judging(model)
        report = examine(judged, AUDITS)
        evidence._memory.update({key: value for key, value in judged._memory.items() if key[0] != UNLEARNED})
        evidence._observed.update(
            {key: value for key, value in judged._observed.items() if key[0] != UNLEARNED}
        )
        return report.verdict

    return judge


def test_the_untouched_model_is_intact(verdict, evidence):
    assert verdict(evidence.original) is Verdict.INTACT


def test_a_refusal_is_suppression(verdict, refusing):
    assert verdict(refusing) is Verdict.SUPPRESSED


def test_a_filter_is_suppression(verdict, filtering):
    assert verdict(filtering) is Verdict.SUPPRESSED


def test_a_wrecked_model_is_damaged(verdict, broken):
    assert verdict(broken) is Verdict.DAMAGED


def test_a_retrained_model_has_removed(verdict, learnt):
    assert verdict(learnt.retrained) is Verdict.REMOVED
