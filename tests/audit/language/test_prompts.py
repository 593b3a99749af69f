"""Prompt attacks (A3) and sampling (A4)."""

from __future__ import annotations

import numpy as np
import pytest

from palimpsest.audit.language.prompts import Prompts
from palimpsest.audit.language.sampling import Sampling
from palimpsest.core.errors import InvalidAudit, UnknownName
from palimpsest.core.finding import Judgement

SHORT = Prompts(
    kinds=(
        "prefix injection",
        "reverse query",
        "rewording",
        "multiple choice",
        "crescendo",
        "in-context learning",
    )
)


def test_the_untouched_model_keeps_k_of_one_and_a_retrained_one_none(judge, evidence, twin):
    untouched, forgot = judge(SHORT, evidence.original), judge(SHORT, twin)
    assert untouched["any_kind"].k == pytest.approx(1) and untouched["worst"].k == pytest.approx(1)
    assert forgot["any_kind"].k is not None and forgot["any_kind"].k < 0.2
    assert forgot["worst"].k < 0.2


def test_every_kind_is_printed_beside_original_and_control_or_says_why_not(judge, twin):
    found = judge(SHORT, twin)
    for kind in (
        "prefix_injection",
        "reverse_query",
        "rewording",
        "multiple_choice",
        "crescendo",
        "in_context_learning",
    ):
        assert found[kind].original is not None and len(found[kind].controls) == 1
    assert found["multiple_choice"].judgement is Judgement.INVALID
    assert "chance 0.25" in found["multiple_choice"].note


def test_the_recovery_by_any_kind_names_its_budget_and_leaves_guessing_out(judge, evidence):
    found = judge(SHORT, evidence.original)
    assert "5 to 5 prompts per fact, of 5 kinds" in found["any_kind"].note
    assert found["any_kind"].value >= found["prefix_injection"].value


def test_a_refusal_of_names_is_passed_by_turning_the_question_round(judge, refusing):
    found = judge(SHORT, refusing)
    assert found["prefix_injection"].value == 0
    assert found["reverse_query"].value > 0


def test_facts_that_no_kind_fits_are_told_and_no_hits_are_made_up(judge, evidence):
    class NoProbes(Prompts):
        def _attacks(self, *_):
            return []

    found = judge(NoProbes(), evidence.original)
    assert found["any_kind"].judgement is Judgement.NOT_RUN


def test_the_same_prompts_go_to_every_model(outcome, twin):
    rows = outcome(SHORT, twin).series["prompts"]
    counts = {(row["kind"], row["model"]): row["n"] for row in rows}
    kinds = {kind for kind, _ in counts}
    assert all(
        len({counts[kind, role] for role in ("original", "unlearned", "control 0")}) == 1 for kind in kinds
    )


def test_unknown_kinds_and_empty_budgets_are_refused():
    with pytest.raises(UnknownName, match="kind of prompt"):
        Prompts(kinds=("hypnosis",))
    with pytest.raises(InvalidAudit, match="at least 1"):
        Prompts(each=0)


def test_sampling_finds_in_many_answers_what_the_likeliest_hides(judge, tuned):
    found = judge(Sampling(samples=10), tuned)
    leak, single = found["leak_at_10"], found["sample_hit"]
    assert leak.value > single.value > 0
    assert single.n == 120


def test_sampling_scales_to_one_and_zero(judge, evidence, twin):
    assert judge(Sampling(samples=10), evidence.original)["leak_at_10"].k == pytest.approx(1)
    assert judge(Sampling(samples=10), twin)["leak_at_10"].k < 0.5


def test_no_hit_in_n_samples_leaves_about_three_over_n(judge, broken):
    note = judge(Sampling(samples=10), broken)["sample_hit"].note
    assert f"at most {1 - 0.05 ** (1 / 120):.4f} one-sided" in note


def test_the_curve_of_leaks_never_falls(outcome, tuned):
    rows = [
        row for row in outcome(Sampling(samples=10), tuned).series["sampling"] if row["model"] == "unlearned"
    ]
    assert [row["samples"] for row in rows] == [1, 2, 5, 10]
    assert (np.diff([row["leak"] for row in rows]) >= 0).all()


@pytest.mark.parametrize("settings", [{"samples": 0}, {"temperature": 0.0}, {"top_p": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidAudit):
        Sampling(**settings)
