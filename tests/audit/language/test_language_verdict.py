"""The verdict on language models whose truth is known.

The slow tests run all default audits at the budgets of the domain; the fast ones those that only read.
"""

from __future__ import annotations

import pytest

from palimpsest.audit import examine
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.forget import forget
from palimpsest.suites.people import settings_of
from tests.audit import planted_language as planted

READING = ["recall", "unwrapping", "hidden-probe", "logit-lens"]


@pytest.fixture(scope="module")
def judged(language_evidence, tiny):
    """Reports by name; what audits find of original and control is shared between them."""
    forget, retain = tiny.split.forget, tiny.split.retain
    plants = {
        "untouched": lambda model: model,
        "noise that changes nothing": lambda model: planted.noisy(model, 1e-5),
        "retrained": lambda _: tiny.controls[1],
        "refusal around the model": lambda model: planted.refusing(model, tiny.task, forget),
        "logit offset": lambda model: planted.offset(model, tiny.task, forget),
        "head alone": lambda model: planted.head_suppressed(model, tiny.task, forget, retain),
        "ascent that ran too long": lambda model: planted.ascended(model, tiny.task, forget, 30, 2e-3),
    }
    reports = {}

    def judge(name: str, audits: list[str] | None):
        key = (name, audits is None)
        if key not in reports:
            evidence = language_evidence.judging(plants[name](tiny.original))
            reports[key] = examine(evidence, audits)
            for mine, theirs in (
                (evidence._memory, language_evidence._memory),
                (evidence._observed, language_evidence._observed),
            ):
                theirs.update({at: value for at, value in mine.items() if at[0] != "unlearned"})
        return reports[key]

    return judge


CASES = {
    "untouched": "intact",
    "noise that changes nothing": "intact",
    "retrained": "removed",
    "refusal around the model": "suppressed",
    "logit offset": "suppressed",
    "head alone": "suppressed",
    "ascent that ran too long": "damaged",
}


DEAR = ("noise that changes nothing", "logit offset", "ascent that ran too long")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in DEAR else ()) for name in CASES]
)
def test_reading_alone_judges_by_what_was_done(judged, name):
    report = judged(name, READING)
    assert report.verdict == CASES[name], report.reasons


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_default_audits_judge_by_what_was_done(judged, name):
    report = judged(name, None)
    assert report.verdict == CASES[name], report.reasons


@pytest.mark.slow
def test_every_valid_k_of_the_original_itself_is_one(judged):
    scaled = [finding for finding in judged("untouched", None).findings if finding.k is not None]
    assert {finding.audit for finding in scaled} >= {"recall", "hidden-probe", "logit-lens", "ablation"}
    for finding in scaled:
        assert finding.k == pytest.approx(1.0, abs=1e-9), finding


@pytest.mark.slow
def test_every_valid_k_of_the_control_itself_is_zero(language_evidence, tiny):
    evidence = language_evidence.judging(tiny.controls[0])
    scaled = [finding for finding in examine(evidence).findings if finding.k is not None]
    assert scaled
    for finding in scaled:
        assert finding.k == pytest.approx(0.0, abs=1e-9), finding


@pytest.mark.slow
def test_several_audits_see_through_a_refusal(judged):
    known = {
        finding.audit
        for finding in judged("refusal around the model", None).findings
        if finding.bears == "inside" and finding.k is not None and finding.k > 0.9
    }
    assert known >= {"hidden-probe", "logit-lens", "unwrapping", "relearning"}


def test_without_a_control_only_absolute_values_are_given(tiny, language_evidence):
    alone = Evidence(tiny.controls[1], tiny.split, tiny.task, language_evidence.runtime, tiny.original, [])
    report = examine(alone, audits=["hidden-probe", "logit-lens"])
    assert report.verdict == "inconclusive" and "no retrained model" in report.reasons[0]
    silent = {item.audit for item in report.findings if item.judgement == Judgement.NOT_RUN}
    assert silent >= {"recall", "patching", "ablation", "relearning"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["guard", "uld", "system-prompt", "in-context"])
def test_published_wrappers_are_suppressed(language_evidence, tiny, name):
    """Settings are not tuned: on so small a model some of them lose utility as well, which the reasons then say."""
    settings = settings_of(name)
    wrapped = forget(tiny.original, tiny.split, name, tiny.task, seed=0, **settings)
    report = examine(language_evidence.judging(wrapped), READING)
    assert report.verdict == "suppressed", report.reasons


@pytest.mark.slow
def test_damage_done_by_a_wrapper_does_not_hide_what_is_inside(language_evidence, tiny):
    everybody = tiny.split.forget.union(tiny.split.retain)
    mute = planted.refusing(tiny.original, tiny.task, everybody)
    report = examine(language_evidence.judging(mute), READING)
    assert report.verdict == "suppressed"
    assert any("As it is served" in reason and "retain_hit" in reason for reason in report.reasons)


@pytest.mark.parametrize("name", ["guard", "uld", "system-prompt", "in-context"])
def test_methods_that_only_stand_in_the_way_declare_suppression(name):
    assert UNLEARNERS.get(name).card.intention == "suppression"
    assert UNLEARNERS.get("npo").card.intention == "removal"
